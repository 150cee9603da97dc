"""Llama 4 and others: the answer is a Python list of calls, [f(a=1), g(b="x")]; nothing of it is executed."""

import ast
import json
import re

from aiollm.text.parsers.source import SPACE, Arguments, Call, End, Source, Steps
from aiollm.text.parsers.tools import Tools

START, STOP = MARKS = ("<|python_start|>", "<|python_end|>")
NAME = re.compile(r"[\w.-]+")
BETWEEN = re.compile(r"[^'\"()\[\]{}]+")
WITHIN_STRING = {quote: re.compile(rf"[^\\{quote}]+") for quote in "'\""}
MAX_CODE = 1 << 12  # characters of a call outside of its strings: so many take Python up to 7 ms to read


def pythonic(source: Source, tools: Tools) -> Steps[None]:
    """Each call is given out when it is complete: what is no call is told from one at its end only."""
    yield from source.run(SPACE)
    yield from source.starts(START)
    yield from source.run(SPACE)
    mark = "," if (yield from source.starts("[")) else ""
    while mark == ",":
        yield from source.run(SPACE)
        name = yield from source.run(NAME)
        if name not in tools:
            break
        before = len(source.held)
        if not (yield from _balanced(source)):
            break
        arguments = _as_json("".join(source.held[before:]))
        if arguments is None:
            break
        source.drop()
        yield Call(name)
        yield Arguments(arguments)
        yield End()
        yield from source.run(SPACE)
        mark = yield from source.starts(",", "]")
        if mark == "]":
            source.drop()
            yield from source.run(SPACE)
            if (yield from source.starts(STOP)):
                source.drop()
    yield from source.content()


def _balanced(source: Source) -> Steps[bool]:
    """Read from an opening parenthesis to the one that closes it; False where there is none."""
    depth = size = 0
    while size <= MAX_CODE and (next_ := (yield from source.peek())):
        if next_ in "'\"":
            yield from _quoted(source, next_)
            size += 2
        elif next_ in "([{":
            depth += 1
            source.read(1)
            size += 1
        elif next_ in ")]}":
            depth -= 1
            source.read(1)
            size += 1
        elif depth:
            size += len((yield from source.run(BETWEEN)))
        else:
            return False
        if depth <= 0:
            return True
    return False


def _quoted(source: Source, quote: str) -> Steps[None]:
    """Read a string of which the opening quote comes next, or what there is of it."""
    source.read(1)
    while next_ := (yield from source.peek()):
        if next_ == "\\":
            source.read(1)
            if (yield from source.peek()):
                source.read(1)
        elif next_ == quote:
            source.read(1)
            return
        else:
            source.piece(WITHIN_STRING[quote])


def _as_json(arguments: str) -> str | None:
    """`(a=1, b='x')` as the text of an object; None where it is anything but literals by name."""
    try:
        call = ast.parse("f" + arguments, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        values = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
        if len(values) < len(call.keywords):
            return None
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return text
