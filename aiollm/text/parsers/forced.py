"""Grammars that leave a model nothing but calls: what a parser reads, written down for llguidance."""

import json
from typing import NamedTuple

from aiollm.text.parsers.reasoning import Style
from aiollm.text.parsers.tools import Tools

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # a model that has nothing to say would go on with white space


class Frame(NamedTuple):
    """What stands around the names and the arguments of calls whose arguments are JSON."""

    before: str
    between: str
    after: str
    joint: str = ""
    begin: str = ""
    end: str = ""


def forced(frame: Frame, tools: Tools, one: bool, style: Style | None, thinking: bool) -> str:
    """The language of one call, or of any number, of these functions, in Lark's syntax.

    A model of some `style` may think before, and does where its prompt leaves it `thinking`.
    """
    calls = ["call"] if one else ["call (", frame.joint and _text(frame.joint), "call)*"]
    start = " ".join(part for part in (_text(frame.begin), *calls, _text(frame.end)) if part)
    rules = []
    if style is not None:
        before = "thought space" if thinking else f"({_text(style.open)} thought space)?"
        start = f"{before} {start}"
        rules = [f"thought[suffix={_text(style.close)}]: /(?s:.*)/", r"space: /[ \n]{0,8}/"]
    rules += ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, (name, schema) in enumerate(tools.items()):
        head, tail = _text(frame.before + name + frame.between), _text(frame.after)
        own = {"type": "object", **schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        rules += [f"call_{index}: {head} arguments_{index} {tail}", f"arguments_{index}: %json {json.dumps(own)}"]
    return "\n".join((f"start: {start}", *rules, ""))


def _text(literal: str) -> str:
    return json.dumps(literal, ensure_ascii=False) if literal else ""
