"""Calls whose arguments stand between tags, each by itself.

GLM 4.5 and later   <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>
Qwen 3 Coder        <tool_call><function=f><parameter=a>1</parameter></function></tool_call>

Arguments that are strings by their schema are given out as they come; all else is JSON, or a string where it is none.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from aiollm.text.parsers.source import SPACE, Arguments, Call, End, Source, Steps
from aiollm.text.parsers.tools import Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, FUNCTION = "<arg_key>", "<function="
NAME = re.compile(r"[\w.-]+")
JSON = re.compile(r'[ \t\r\n]*["{\[]')
QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')
WITHIN_KEY = re.compile(r"[^<>]+")


class Tags(NamedTuple):
    """Around each argument, and behind the last one."""

    key: str
    key_end: str
    value: str
    value_ends: tuple[str, ...]
    close: str


GLM = Tags(KEY, "</arg_key>", "<arg_value>", ("</arg_value>",), CLOSE)
QWEN = Tags("<parameter=", ">", "\n", ("\n</parameter>", "</parameter>"), "</function>")


def glm(source: Source, tools: Tools) -> Steps[None]:
    while (yield from source.content(OPEN)):
        yield from source.run(SPACE)
        name = yield from source.run(NAME)
        yield from _call(source, tools, GLM, name)


def qwen_coder(source: Source, tools: Tools) -> Steps[None]:
    """The outer tags may be missing."""
    while mark := (yield from source.content(OPEN, FUNCTION)):
        if mark == OPEN:
            yield from source.run(SPACE)
            mark = yield from source.starts(FUNCTION)
        name = yield from source.run(NAME)
        if mark and (yield from source.starts(">")):
            yield from _call(source, tools, QWEN, name)
            yield from source.run(SPACE)
            if (yield from source.starts(CLOSE)):
                source.drop()


def _call(source: Source, tools: Tools, tags: Tags, name: str) -> Steps[None]:
    """A call from behind its name; where the text ends within it, so does the object of its arguments."""
    yield from source.run(SPACE)
    mark = yield from source.starts(tags.key, tags.close)
    if not name or not mark:
        return
    source.drop()
    yield Call(name)
    properties, between = tools.get(name, {}).get("properties"), "{"
    while mark == tags.key:
        key = (yield from source.run(WITHIN_KEY)).strip()
        if not (yield from source.starts(tags.key_end)):
            break
        if tags.value.strip():
            yield from source.run(SPACE)
        if not (yield from source.starts(tags.value)) and tags.value.strip():
            break
        source.drop()
        yield Arguments(between + _text(key) + ": ")
        between = ", "
        if is_text(properties, key):
            yield Arguments('"')
            if not (yield from source.until(tags.value_ends, _within_text)):
                return
            yield Arguments('"')
        else:
            schema = properties.get(key) if isinstance(properties, dict) else None
            if (value := (yield from _value(source, tags.value_ends, schema))) is None:
                return
            yield Arguments(_literal(value))
        source.drop()
        yield from source.run(SPACE)
        mark = yield from source.starts(tags.key, tags.close)
    if mark == tags.close:
        source.drop()
    elif not (yield from source.peek()):
        return
    yield Arguments("{}" if between == "{" else "}")
    yield End()


def _value(source: Source, ends: Sequence[str], schema: object) -> Steps[str | None]:
    """Read a value up to the tag that ends it; None where there is none.

    Of an argument with a schema, a tag within a string of JSON ends nothing.
    """
    first = last = len(source.held)
    is_json, within = bool(schema), False
    while end := (yield from source.until(ends, None)):
        piece = "".join(source.held[last:]).removesuffix(end)
        is_json = is_json and (last > first or JSON.match(piece) is not None)
        within ^= len(QUOTE.findall(piece)) % 2 == 1
        if not (is_json and within):
            return "".join(source.held[first:]).removesuffix(end)
        last = len(source.held)
    return None


def is_text(properties: object, key: str) -> bool:
    """Whether the schema has the argument a string."""
    schema = properties.get(key) if isinstance(properties, dict) else None
    return isinstance(schema, dict) and schema.get("type") == "string"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _within_text(value: str) -> Arguments:
    return Arguments(_text(value)[1:-1])


def _literal(value: str) -> str:
    try:
        msgspec.json.decode(value, type=msgspec.Raw)
        return value.strip()
    except (msgspec.DecodeError, RecursionError):
        return _text(value)
