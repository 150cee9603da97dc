"""Llama 3: {"name": "f", "parameters": {...}} as the whole answer, or behind <|python_tag|>; several parted by ;."""

from collections.abc import Container, Sequence

from aiollm.text.parsers import lark
from aiollm.text.parsers.json_call import ARGUMENTS, NAMES, json_call
from aiollm.text.parsers.source import SPACE, Source, Steps
from aiollm.text.parsers.tools import Tools
from aiollm.wire.sampling import Tag

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


def guarded(tools: Tools, tags: Sequence[Tag] = ()) -> str:
    """The language of text that calls nothing, or ends with calls of these functions, or is nothing but such calls.

    No mark says that an answer is a call: an object is one that names a function. So no other object may do that, and
    none stands behind white space.
    """
    space = lark.SPACE
    names = f'"(?:{"|".join(map(_spelled, NAMES))})"[ \\t\\r\\n]*:[ \\t\\r\\n]*"(?:{"|".join(map(_spelled, tools))})"'
    refused = (r"[ \t\r\n]+\{(?s:.*)", rf"\{{(?s:.*){names}(?s:.*)")
    rules = [
        "start: calls | TEXT | free calls",
        f"calls: call (/{space};{space}/ call)*",
        "call: " + " | ".join(f"call_{index}" for index in range(len(tools))),
        f"TEXT: {lark.without([TAG], refused)}",
        *lark.upto("free", TAG, tags, lark.without((), refused)),
    ]
    kind, keys = f'(?:"type"{space}:{space}"function"{space},{space})?', "|".join(ARGUMENTS)
    for index, (name, schema) in enumerate(tools.items()):
        called = f'"name"{space}:{space}"{lark.pattern(name)}"{space},{space}"(?:{keys})"{space}:{space}'
        rules += [
            rf"call_{index}: /\{{{space}{kind}{called}/ arguments_{index} /{space}\}}/",
            lark.value(f"arguments_{index}", {"type": "object", **schema}),
        ]
    return "\n".join((*rules, ""))


def _spelled(text: str) -> str:
    """All ways to write it within a string of JSON."""
    return "".join(rf"(?:{lark.pattern(char)}|\\(?i:u{ord(char):04x}))" for char in text)
