"""Llama 3: {"name": "f", "parameters": {...}} as the whole answer, or behind <|python_tag|>; several parted by ;."""

from collections.abc import Container

from aiollm.text.parsers.json_call import json_call
from aiollm.text.parsers.source import SPACE, Source, Steps
from aiollm.text.parsers.tools import Tools

TAG = "<|python_tag|>"
MARKS = (TAG,)


def llama(source: Source, tools: Tools) -> Steps[None]:
    yield from source.run(SPACE)
    yield from _calls(source, tools)
    while (yield from source.content(TAG)):
        yield from source.run(SPACE)
        yield from _calls(source, None)


def _calls(source: Source, known: Container[str] | None) -> Steps[None]:
    while (yield from json_call(source, known)):
        yield from source.run(SPACE)
        yield from source.starts(";", ",")
        yield from source.run(SPACE)
