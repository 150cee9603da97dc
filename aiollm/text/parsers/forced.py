"""Grammars of calls whose arguments are JSON, for llguidance: what a parser reads, written down in Lark's syntax.

`tags` are the marks of a format as the model's tokens write them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from aiollm.text.parsers.lark import terms, upto, value, without
from aiollm.text.parsers.tools import Tools
from aiollm.wire.sampling import Tag


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


def forced(frame: Frame, tools: Tools, one: bool, tags: Sequence[Tag] = ()) -> str:
    """The language of one call, or of any number, of these functions and of nothing else."""
    return "\n".join((f"start: {_calls(frame, one, tags)}", *_each(frame, tools, tags), ""))


def guarded(frame: Frame, tools: Tools, tags: Sequence[Tag] = ()) -> str:
    """The language of any text in which the frame's mark always begins a call of one of these functions."""
    rest = frame._replace(
        begin=frame.begin.removeprefix(frame.mark),
        before=frame.before if frame.begin else frame.before.removeprefix(frame.mark),
    )
    calls = _calls(rest, not frame.begin, tags)  # others bring the mark again
    rules = (f"start: (free {calls})* TAIL", f"TAIL: {without([frame.mark])}", *upto("free", frame.mark, tags))
    return "\n".join((*rules, *_each(rest, tools, tags), ""))


def _calls(frame: Frame, one: bool, tags: Sequence[Tag]) -> str:
    parts = ["call"] if one else ["call (", terms(frame.joint, tags), "call)*"]
    return " ".join(part for part in (terms(frame.begin, tags), *parts, terms(frame.end, tags)) if part)


def _each(frame: Frame, tools: Tools, tags: Sequence[Tag]) -> list[str]:
    """The rule of a call, and the rules of each function."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, (name, schema) in enumerate(tools.items()):
        head, tail = terms(frame.before + name + frame.between, tags), terms(frame.after, tags)
        rules += [
            f"call_{index}: {head} arguments_{index} {tail}",
            value(f"arguments_{index}", {"type": "object", **schema}),
        ]
    return rules
