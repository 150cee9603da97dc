"""Pieces of grammars in Lark's syntax, for llguidance."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from aiollm.wire.sampling import Tag

SPACE = r"[ \t\r\n]{0,8}"
ANY = "/(?s:.*)/"


def terms(text: str, tags: Sequence[Tag]) -> str:
    """A literal text; of the tags in it those that are special tokens stand as such: no other token spells them."""
    special = {tag.text: tag.ids[0] for tag in tags if tag.special}
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else quoted(part) for part in parts if part)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def pattern(text: str) -> str:
    """A literal text within a regular expression."""
    return re.escape(text).replace("/", r"\/")


def without(texts: Iterable[str], refused: Iterable[str] = ()) -> str:
    """The regular expression of text in which none of `texts` stands, and that is none of the patterns `refused`."""
    patterns = (*(f"(?s:.*){pattern(text)}(?s:.*)" for text in texts), *refused)
    return " & ".join((ANY, *(f"~/{each}/" for each in patterns)))


def upto(rule: str, mark: str, tags: Sequence[Tag], text: str = ANY) -> list[str]:
    """The rule of text up to a mark and with it, of which `text` is the regular expression.

    Where the mark is a special token its characters stay forbidden in the text: parsers take them for the mark.
    """
    name = rule.upper()
    if any(tag.special and tag.text == mark for tag in tags):
        return [f"{rule}: {name} {terms(mark, tags)}", f"{name}: {text} & {without([mark])}"]
    return [f"{rule}[suffix={quoted(mark)}]: {name}", f"{name}: {text}"]


def value(rule: str, schema: object, **keywords: Any) -> str:
    """The rule of a JSON value of this schema, to which keywords are added."""
    own = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
    return f"{rule}: %json {json.dumps({**own, **keywords})}"
