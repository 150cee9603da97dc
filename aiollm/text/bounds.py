"""How large what a chat template computes can be, told before it is computed.

`BINARY`, `METHODS` and `FILTERS` say how many characters operators, methods of strings and numbers, and filters make of
their operands at most. A number's bits count as characters so that MAX_BITS of them are MAX_CHARS.
"""

import re
import string
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any, NamedTuple

import jinja2.utils

# 32 Mi characters is some 8 million tokens: beyond every context, and what a runaway template may cost at most.
MAX_CHARS = 32 * 1024 * 1024
MAX_BITS = 1 << 16  # of a number that a template computes
DIGIT = 4 * MAX_CHARS // MAX_BITS  # what a decimal digit counts
WIDTH = r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?"  # of a % in a format, in front of its letter

Bound = Callable[..., int]


class Extent(NamedTuple):
    """Of a value's text: about how long it is, how many parts it has, and how deep they lie at most."""

    chars: int
    parts: int = 1
    depth: int = 1


def extent(value: Any, known: dict[int, tuple[Any, Extent]] | None = None) -> Extent:
    """`known` has those of lists and the like by their id: they may hold one another a thousand times."""
    if isinstance(value, str | bytes):
        return Extent(len(value))
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    inside = _inside(value)
    if inside is None:
        return Extent(value.bit_length() // 3 + 2 if isinstance(value, int) else 24)
    known[id(value)] = value, Extent(5)  # within itself
    size, parts, depth = 2, 1, 0
    for each in inside:
        found = extent(each, known)
        size, parts, depth = size + found.chars + 4, parts + found.parts, max(depth, found.depth)
    known[id(value)] = value, Extent(size, parts, depth + 1)
    return known[id(value)][1]


def _inside(value: Any) -> Iterable[Any] | None:
    """What the text of a value shows of others."""
    if isinstance(value, jinja2.utils.Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return list(value) if isinstance(value, KeysView | ValuesView | ItemsView) else None


def chars(value: Any) -> int:
    return len(value) if isinstance(value, str) else extent(value).chars


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _times(left: Any, right: Any) -> int:
    match left, right:
        case int(), int():
            return (left.bit_length() + right.bit_length()) * (MAX_CHARS // MAX_BITS)
        case int(), _:
            return left * _length(right)
        case _, int():
            return right * _length(left)
    return 0


def _power(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) * (MAX_CHARS // MAX_BITS)
    return 0


def _percent(form: Any, values: Any) -> int:
    """form % values"""
    if not isinstance(form, str | bytes):
        return 0
    text = form if isinstance(form, str) else form.decode("latin-1")
    starts = re.findall((r"[%)]" if "%(" in text else "%") + WIDTH, text)
    return len(text) + _filled([width for pair in starts for width in pair], "*", values)


def _braces(form: str, /, *args: Any, **kwargs: Any) -> int:
    """form.format(*args, **kwargs)"""
    specs = [spec or "" for _, name, spec, _ in string.Formatter().parse(form) if name is not None]
    return len(form) + _filled(specs, "{", [args, kwargs])


def _filled(specs: list[str], mark: str, values: Any) -> int:
    """What fields may write: each the longest value, all their widths, and where `mark` says so those among values."""
    longest = chars(values)
    if longest > MAX_CHARS:
        return longest
    numbers = [*specs, str(values)] if any(mark in spec for spec in specs) else specs
    return len(specs) * longest + sum(int(digits) for text in numbers for digits in re.findall(r"\d+", text))


def _width(text: Any, width: Any = 80, *_: Any, **__: Any) -> int:
    return chars(text) + (width if isinstance(width, int) else 0)


def _tabs(text: str | bytes, tabsize: int = 8) -> int:
    tabs = text.count("\t") if isinstance(text, str) else text.count(b"\t")
    return len(text) + tabs * tabsize


def _replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    size = chars(text)
    if size > MAX_CHARS or isinstance(text, bytes):
        return size + size * chars(new)
    return size + str(text).count(str(old)) * chars(new)


def _joined(items: Any, between: Any) -> int:
    return chars(items) + _length(items) * chars(between)


def _translated(text: str | bytes, table: Any, *_: Any) -> int:
    sizes = [chars(value) for value in table.values()] if isinstance(table, Mapping) else []
    return len(text) * max([1, *sizes])


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    size = chars(text)
    lines = len(str(text).splitlines()) + 1 if size <= MAX_CHARS else 1
    return size + lines * (width if isinstance(width, int) else chars(width))


def _wrapped(
    text: Any, width: int = 79, break_long_words: bool = True, wrapstring: Any = None, *_: Any, **__: Any
) -> int:
    return chars(text) * (1 + chars(wrapstring or ""))


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = (), *_: Any, **__: Any) -> int:
    """Each part may stand on a line of its own, behind the indents of all that it is in."""
    found, step = extent(value), indent if isinstance(indent, int) else chars(indent or "")
    return found.chars + 2 * found.parts * (found.depth * step + chars(separators or ()))


def _text(value: Any, *_: Any, **__: Any) -> int:
    return chars(value)


BINARY: Mapping[str, Bound] = {
    "+": lambda left, right: _length(left) + _length(right),
    "*": _times,
    "**": _power,
    "%": _percent,
}
METHODS: Mapping[str, Bound] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _width),
    "expandtabs": _tabs,
    "format": _braces,
    "format_map": _braces,
    "join": lambda between, items: _joined(items, between),
    "replace": _replaced,
    "to_bytes": lambda number, length=1, *_, **__: length,
    "translate": _translated,
}
FILTERS: Mapping[str, Bound] = {
    **dict.fromkeys(("capitalize", "e", "escape", "forceescape", "lower", "pprint", "string", "striptags"), _text),
    **dict.fromkeys(("title", "trim", "truncate", "upper", "urlencode", "wordcount", "xmlattr"), _text),
    "batch": lambda items, linecount, fill_with=None: 0 if fill_with is None else linecount,
    "center": _width,
    "format": lambda form, /, *args, **kwargs: _percent(str(form), kwargs or args),
    "indent": _indented,
    "join": lambda value, d="", *_, **__: _joined(value, d),
    "replace": _replaced,
    "round": lambda number, precision=0, *_, **__: abs(precision) * DIGIT,
    "tojson": _json,
    "urlize": lambda value, *args, **kwargs: chars(value) * (1 + (chars([args, kwargs]) if args or kwargs else 0)),
    "wordwrap": _wrapped,
}
