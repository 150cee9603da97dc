"""The environment of chat templates: no way to Python's objects, and no single operation that makes gigabytes.

A rendering is stopped between two of Python's instructions (limit.py). What is one call into C, such as padding a text
to two billion characters, ends first: so it is measured before it begins (bounds.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiollm.text.bounds import BINARY, FILTERS, MAX_CHARS, METHODS, Bound, chars


class Generator(jinja2.compiler.CodeGenerator):
    """Has ~ and comparisons ask the sandbox: jinja intercepts arithmetic alone."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.joined(context, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: jinja2.nodes.Compare, frame: jinja2.compiler.Frame) -> None:
        self.write("(environment.comparable(")
        self.visit(node.expr, frame)
        self.write(")")
        for each in node.ops:
            self.visit(each, frame)
        self.write(")")

    def visit_Operand(self, node: jinja2.nodes.Operand, frame: jinja2.compiler.Frame) -> None:
        self.write(f" {jinja2.compiler.operators[node.op]} environment.comparable(")
        self.visit(node.expr, frame)
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """Raises SecurityError before an operation that could make more than MAX_CHARS characters or MAX_BITS bits.

    Nothing is computed while a template is compiled.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = Generator

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """`filters` come beside jinja's own, or in their place."""
        super().__init__(optimized=False, finalize=_finalized, **options)
        self.filters.update(filters, sum=_sum)
        for name, bound in FILTERS.items():
            self.filters[name] = _bounded(name, bound, self.filters[name])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _check(operator, BINARY[operator](left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja puts a function of its own around str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int) and name in METHODS:
            args = _held(name, args)
            _check(name, METHODS[name](owner, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What blocks and macros have written."""
        parts = list(parts)
        _check("a block", sum(map(len, parts)))
        return "".join(parts)

    @staticmethod
    def joined(context: jinja2.runtime.Context, parts: tuple[Any, ...]) -> str:
        """a ~ b"""
        _check("~", sum(map(chars, parts)))
        if context.eval_ctx.autoescape:
            return jinja2.runtime.markup_join(parts)
        return jinja2.runtime.str_join(parts)

    @staticmethod
    def comparable(value: Any) -> Any:
        """An operand of == and the like."""
        if not isinstance(value, str | int):
            _check("a comparison", chars(value))
        return value


def _check(name: str, size: float) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"what {name} makes of such operands is too large")


def _held(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `join`, with a list for an iterator, which can be gone through twice."""
    return tuple(list(each) if isinstance(each, Iterator) else each for each in args) if name == "join" else args


@jinja2.pass_context
def _finalized(context: jinja2.runtime.Context, value: Any) -> Any:
    """What {{ }} writes."""
    if not isinstance(value, str | int):
        _check("the text", chars(value))
    return value


def _bounded(name: str, bound: Bound, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is measured first; the first argument of some is the environment or the like."""
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        args = _held(name, args)
        _check(name, bound(*args[skipped:], **kwargs))
        return function(*args, **kwargs)

    return filtered


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """The filter `sum`, one addition after the other."""
    get = jinja2.filters.make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    for item in iterable:
        _check("sum", BINARY["+"](start, get(item)))
        start = start + get(item)
    return start
