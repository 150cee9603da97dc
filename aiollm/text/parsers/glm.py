"""GLM 4.5 and later: <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>, a key for each argument."""

import json
import re

import msgspec

from aiollm.text.parsers.source import SPACE, Arguments, Call, End, Source, Steps
from aiollm.text.parsers.tools import Tools

OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END = MARKS = (
    "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
NAME = re.compile(r"[\w.-]+")
WITHIN_KEY = re.compile(r"[^<]+")


def glm(source: Source, tools: Tools) -> Steps[None]:
    while (yield from source.content(OPEN)):
        yield from source.run(SPACE)
        name = yield from source.run(NAME)
        yield from source.run(SPACE)
        mark = yield from source.starts(KEY, CLOSE)
        if not name or not mark:
            continue
        source.drop()
        yield Call(name)
        yield from _arguments(source, mark, tools.get(name, {}).get("properties"))


def _arguments(source: Source, mark: str, properties: object) -> Steps[None]:
    """The arguments as one object; where the text ends among them, so does the object."""
    between = "{"
    while mark == KEY:
        key = yield from source.run(WITHIN_KEY)
        if not (yield from source.starts(KEY_END)):
            break
        yield from source.run(SPACE)
        if not (yield from source.starts(VALUE)):
            break
        source.drop()
        yield Arguments(between + _text(key.strip()) + ": ")
        between = ", "
        if _is_text(properties, key.strip()):
            yield Arguments('"')
            if not (yield from source.until((VALUE_END,), _within_text)):
                return
            yield Arguments('"')
        else:
            if not (yield from source.until((VALUE_END,), None)):
                return
            yield Arguments(_literal(source.release().removesuffix(VALUE_END)))
        source.drop()
        yield from source.run(SPACE)
        mark = yield from source.starts(KEY, CLOSE)
    if mark == CLOSE:
        source.drop()
    elif not (yield from source.peek()):
        return
    yield Arguments("{}" if between == "{" else "}")
    yield End()


def _is_text(properties: object, key: str) -> bool:
    """Whether the schema has the argument a string."""
    schema = properties.get(key) if isinstance(properties, dict) else None
    return isinstance(schema, dict) and schema.get("type") == "string"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _within_text(value: str) -> Arguments:
    return Arguments(_text(value)[1:-1])


def _literal(value: str) -> str:
    """A value of any other type is written as JSON; what is none is a string."""
    try:
        msgspec.json.decode(value, type=msgspec.Raw)
        return value.strip()
    except (msgspec.DecodeError, RecursionError):
        return _text(value)
