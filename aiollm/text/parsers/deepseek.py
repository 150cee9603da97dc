"""DeepSeek: between marks a name and JSON, which V3 and R1 put into a code block and V3.1 does not."""

import re

from aiollm.text.parsers.json_call import arguments
from aiollm.text.parsers.source import SPACE, Call, Source, Steps
from aiollm.text.parsers.tools import Tools

BEGIN, END, CALL, CALL_END, BETWEEN = MARKS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
HEAD = re.compile(r"[\w.-]+")
FENCE = "```"


def deepseek(source: Source, tools: Tools) -> Steps[None]:
    while (yield from source.content(BEGIN)):
        called = False
        while True:
            yield from source.run(SPACE)
            if not (yield from source.starts(CALL)) or not (yield from _call(source)):
                break
            called = True
        if called and (yield from source.starts(END)):
            source.drop()


def _call(source: Source) -> Steps[bool]:
    name = yield from source.run(HEAD)  # "function" where the name follows the mark
    if not (yield from source.starts(BETWEEN)):
        return False
    yield from source.run(SPACE)
    fenced = (yield from source.peek()) != "{"
    if fenced:
        name = yield from source.run(HEAD)
        yield from source.run(SPACE)
        if not (yield from source.starts(FENCE + "json")):
            return False
        yield from source.run(SPACE)
    if not name or (yield from source.peek()) != "{":
        return False
    source.drop()
    yield Call(name)
    yield from arguments(source)
    yield from source.run(SPACE)
    if fenced:
        yield from source.starts(FENCE)
        yield from source.run(SPACE)
    if (yield from source.starts(CALL_END)):
        source.drop()
    return True
