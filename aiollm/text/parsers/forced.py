"""Grammars of calls, for llguidance: what a parser reads, written down in Lark's syntax."""

import json
import re
from typing import NamedTuple

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
    mark: str = ""
    """What calls begin with and other text does not contain, if there is such a thing."""


def forced(frame: Frame, tools: Tools, one: bool) -> str:
    """The language of one call, or of any number, of these functions and of nothing else."""
    return "\n".join((f"start: {_calls(frame, one)}", *_each(frame, tools), ""))


def guarded(frame: Frame, tools: Tools) -> str:
    """The language of any text in which the frame's mark always begins a call of one of these functions."""
    rest = frame._replace(
        begin=frame.begin.removeprefix(frame.mark),
        before=frame.before if frame.begin else frame.before.removeprefix(frame.mark),
    )
    calls = _calls(rest, one=not frame.begin)  # others bring the mark again
    rules = [
        f"start: (free {calls})* TAIL",
        f"free[suffix={_text(frame.mark)}]: /(?s:.*)/",
        f"TAIL: /(?s:.*)/ & ~/(?s:.*){re.escape(frame.mark)}(?s:.*)/",
    ]
    return "\n".join((*rules, *_each(rest, tools), ""))


def _calls(frame: Frame, one: bool) -> str:
    parts = ["call"] if one else ["call (", _text(frame.joint), "call)*"]
    return " ".join(part for part in (_text(frame.begin), *parts, _text(frame.end)) if part)


def _each(frame: Frame, tools: Tools) -> list[str]:
    """The rule of a call, and the rules of each function."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, (name, schema) in enumerate(tools.items()):
        head, tail = _text(frame.before + name + frame.between), _text(frame.after)
        own = {"type": "object", **schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        rules += [f"call_{index}: {head} arguments_{index} {tail}", f"arguments_{index}: %json {json.dumps(own)}"]
    return rules


def _text(literal: str) -> str:
    return json.dumps(literal, ensure_ascii=False) if literal else ""
