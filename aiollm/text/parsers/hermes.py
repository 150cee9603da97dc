"""Hermes and Qwen 2.5 and 3: <tool_call>{"name": "f", "arguments": {...}}</tool_call>, as often as there are calls."""

from aiollm.text.parsers.json_call import json_call
from aiollm.text.parsers.source import SPACE, Source, Steps
from aiollm.text.parsers.tools import Tools

OPEN, CLOSE = MARKS = ("<tool_call>", "</tool_call>")


def hermes(source: Source, tools: Tools) -> Steps[None]:
    while (yield from source.content(OPEN)):
        yield from source.run(SPACE)
        if (yield from json_call(source)):
            yield from source.run(SPACE)
            if (yield from source.starts(CLOSE)):
                source.drop()
