"""Mistral: [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...], and in newer models [TOOL_CALLS]f[ARGS]{...} each."""

import re

from aiollm.text.parsers.json_call import arguments, json_call
from aiollm.text.parsers.source import SPACE, Call, Source, Steps
from aiollm.text.parsers.tools import Tools

OPEN, ID, ARGS = MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
NAME = re.compile(r"[\w.-]+")


def mistral(source: Source, tools: Tools) -> Steps[None]:
    while (yield from source.content(OPEN)):
        yield from source.run(SPACE)
        if (yield from source.starts("[")):
            yield from _list(source)
        elif name := (yield from source.run(NAME)):
            if (yield from source.starts(ID)):
                yield from source.run(NAME)
            yield from source.starts(ARGS)
            yield from source.run(SPACE)
            if (yield from source.peek()) == "{":
                source.drop()
                yield Call(name)
                yield from arguments(source)
        else:
            yield from json_call(source)


def _list(source: Source) -> Steps[None]:
    mark = ","
    while mark == ",":
        yield from source.run(SPACE)
        if not (yield from json_call(source)):
            return
        yield from source.run(SPACE)
        mark = yield from source.starts(",", "]")
    if mark:
        source.drop()
