"""Calls that are written as JSON: {"name": "f", "arguments": {...}}."""

import re
from collections.abc import Container

import msgspec

from aiollm.text.parsers.source import SPACE, Arguments, Call, End, Source, Steps

NAMES = ("name", "function")
ARGUMENTS = ("arguments", "parameters")
OTHERS = ("type", "id")
WITHIN_STRING = re.compile(r'[^"\\]+')
BETWEEN = re.compile(r'[^"{}\[\]]+')
SCALAR = re.compile(r'[^\s,:"{}\[\]]+')


def json_call(source: Source, known: Container[str] | None = None) -> Steps[bool]:
    """Read an object that is a call, its members in any order; False where there is none, and what was read is held.

    With `known` names it counts only if it calls one of them, and has arguments: then no mark says that it is a call.
    """
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    called = False
    if not (yield from source.starts("{")):
        return False
    while True:
        yield from source.run(SPACE)
        key = yield from _text(source)
        yield from source.run(SPACE)
        if key is None or not (yield from source.starts(":")):
            return called
        yield from source.run(SPACE)
        if key in NAMES and name is None:
            name = yield from _text(source)
            if not name or (known is not None and name not in known):
                return False
            if early is not None:
                called = True
                source.drop()
                yield from _given(name, early)
        elif key in ARGUMENTS and name is not None and not called:
            called = True
            source.drop()
            yield Call(name)
            yield from arguments(source)
        elif key in ARGUMENTS and early is None and not called:
            before = len(source.held)
            if not (yield from _value(source, give=False)):
                return False
            early = _unquoted("".join(source.held[before:]))
        elif called or key in OTHERS:
            yield from _value(source, give=False)
        else:
            return False
        yield from source.run(SPACE)
        end = yield from source.starts(",", "}")
        if end == ",":
            continue
        if end == "}" and name is not None and not called and known is None:
            called = True
            yield from _given(name, "{}")
        if end == "}" and called:
            source.drop()
        return called


def arguments(source: Source) -> Steps[None]:
    """Give out the arguments of a call that has begun: the value as it stands, or the JSON text that it is a string of.

    They may be anything between balanced brackets: what is no JSON is the caller's to refuse.
    """
    if (yield from source.peek()) == "{":
        complete = yield from _value(source, give=True)
    else:
        complete = yield from _value(source, give=False)
        if text := _unquoted(source.release()):
            yield Arguments(text)
    if complete:
        yield End()


def _given(name: str, text: str) -> Steps[None]:
    yield Call(name)
    yield Arguments(text)
    yield End()


def _value(source: Source, give: bool) -> Steps[bool]:
    """Read a value, and give it out as arguments as it comes or hold it; False where it does not end, or none is."""
    depth = 0
    while next_ := (yield from source.peek()):
        if next_ == '"':
            if not (yield from _quoted(source, give)):
                return False
        elif next_ in "{[":
            depth += 1
            source.read(1)
        elif next_ in "}]" and depth:
            depth -= 1
            source.read(1)
        elif depth:
            source.piece(BETWEEN)
        elif not (yield from source.run(SCALAR)):
            return False
        if give and source.held:
            yield Arguments(source.release())
        if not depth:
            return True
    return False


def _quoted(source: Source, give: bool = False) -> Steps[bool]:
    """Read a string of which the opening quote comes next; False where it does not end."""
    source.read(1)
    while True:
        if give:
            yield Arguments(source.release())
        next_ = yield from source.peek()
        if next_ == "\\":
            source.read(1)
            if (yield from source.peek()):
                source.read(1)
        elif next_ == '"':
            source.read(1)
            return True
        elif next_:
            source.piece(WITHIN_STRING)
        else:
            return False


def _text(source: Source) -> Steps[str | None]:
    """Read a string; None where there is none."""
    before = len(source.held)
    if (yield from source.peek()) != '"' or not (yield from _quoted(source)):
        return None
    return _decoded("".join(source.held[before:]))


def _decoded(literal: str) -> str | None:
    try:
        return msgspec.json.decode(literal, type=str)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _unquoted(value: str) -> str:
    """Arguments as the text of an object, where they are that text in a string, or nothing."""
    text = (_decoded(value) or "") if len(value) > 1 and value.startswith('"') and value.endswith('"') else value
    return "{}" if text.strip() in ("", "null") and value else text
