"""Grammars of text in which calls are proper ones, where arguments stand between tags, each by itself.

A string is any text up to its closing tag, all else is JSON: each argument has a grammar, and they come in the order of
the schema. What is said of the object as a whole, or of a string's pattern, has none and is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiollm.text.folder import TextError
from aiollm.text.parsers import lark
from aiollm.text.parsers.tagged import CLOSE, FUNCTION, GLM, OPEN, QWEN, Tags, is_text
from aiollm.text.parsers.tools import Tools
from aiollm.wire.sampling import Tag

DEFINITIONS = ("$defs", "definitions")
NOTES = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
OF_OBJECTS = {"type", "properties", "required", "additionalProperties", *DEFINITIONS, *NOTES}
OF_TEXTS = {"type", "enum", "const", "minLength", "maxLength", *NOTES}
ELSEWHERE = re.compile(r'"\$ref": "(?!#/(?:\$defs|definitions)/)')
KEY = re.compile(r"[^<>\s](?:[^<>]*[^<>\s])?")


def glm(tools: Tools, tags: Sequence[Tag] = ()) -> str:
    """The language of any text in which calls are calls of these functions. Raises TextError."""
    rules = ["start: (free space call)* TEXT", f"TEXT: {lark.without([OPEN])}", *lark.upto("free", OPEN, tags)]
    return "\n".join((*rules, *_calls(tools, GLM, "", tags), ""))


def qwen_coder(tools: Tools, tags: Sequence[Tag] = ()) -> str:
    """As `glm`; the outer tags may be missing."""
    rules = [
        f"start: (free space {lark.quoted(FUNCTION)} call space {lark.terms(CLOSE, tags)} | bare call)* TEXT",
        f"TEXT: {lark.without([OPEN, FUNCTION])}",
        *lark.upto("free", OPEN, tags, lark.without([FUNCTION])),
        *lark.upto("bare", FUNCTION, tags, lark.without([OPEN])),
    ]
    return "\n".join((*rules, *_calls(tools, QWEN, ">", tags), ""))


def _calls(tools: Tools, around: Tags, behind: str, tags: Sequence[Tag]) -> Iterator[str]:
    """The rules of a call from its name on, behind which there is something."""
    yield f"space: /{lark.SPACE}/"
    yield "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
    for index, (name, schema) in enumerate(tools.items()):
        properties, required = _properties(name, schema)
        parts = [lark.terms(name + behind, tags)]
        for at, key in enumerate(properties):
            parts.append(f"(space argument_{index}_{at}){'' if key in required else '?'}")
            yield f"argument_{index}_{at}: {_head(lark.terms(key, tags), around, tags)} value_{index}_{at}"
            if is_text(properties, key):
                yield from _text(f"value_{index}_{at}", key, properties[key], around, tags)
            else:
                yield f"value_{index}_{at}: json_{index}_{at} {lark.terms(around.value_ends[0], tags)}"
                definitions = {key: schema[key] for key in DEFINITIONS if key in schema}
                yield lark.value(f"json_{index}_{at}", properties[key], **definitions)
        if not properties and schema.get("additionalProperties", True) in (True, {}):
            parts.append("(space argument)*")
        yield f"call_{index}: {' '.join(parts)} space {lark.terms(around.close, tags)}"
    yield f"argument: {_head('KEY', around, tags)} anything"
    yield "KEY: /[^<>]{1,64}/"
    yield from lark.upto("anything", around.value_ends[-1], tags)


def _head(key: str, around: Tags, tags: Sequence[Tag]) -> str:
    """An argument up to its value."""
    begin = f"space {lark.terms(around.value, tags)}" if around.value.strip() else lark.quoted(around.value)
    return f"{lark.terms(around.key, tags)} {key} {lark.terms(around.key_end, tags)} {begin}"


def _text(rule: str, key: str, schema: Mapping[str, Any], around: Tags, tags: Sequence[Tag]) -> list[str]:
    """The rules of a string and its end: one of some, one of a length, or any."""
    if unknown := sorted(schema.keys() - OF_TEXTS):
        raise TextError(f"{key}: {unknown[0]} of a string cannot be followed in this model's format of calls")
    end, close = around.value_ends[0], around.value_ends[-1]
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not (type(least) is int and least >= 0 and (most is None or (type(most) is int and least <= most))):
        raise TextError(f"{key}: minLength and maxLength must be whole numbers, the second not the smaller one")
    if schema.keys() & {"enum", "const"}:
        among = schema.get("enum", [schema.get("const")])
        texts = [text for text in among if isinstance(text, str)] if isinstance(among, list) else []
        texts = [text for text in texts if text == schema.get("const", text) and close not in text]
        texts = [text for text in texts if least <= len(text) and (most is None or len(text) <= most)]
        if not texts:
            raise TextError(f"{key}: there is no text that it may be")
        return [f"{rule}: {' | '.join(lark.terms(text + end, tags) for text in texts)}"]
    if most == 0:
        return [f"{rule}: {lark.terms(end, tags)}"]
    if not least and most is None:
        return [f"{rule}: anything"]
    name = rule.upper()
    part = f"{name}_PART: /(?s:.{{{least},{'' if most is None else most}}})/ & {lark.without([close])}"
    if any(tag.special and tag.text == end for tag in tags):
        return [f"{rule}: {name}_PART {lark.terms(end, tags)}", part]
    return [f"{rule}: {name}", f"{name}: {name}_PART {lark.quoted(end)}", part]


def _properties(name: str, schema: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
    """The arguments of a function by name, and the names of those that must be there."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if unknown := sorted(schema.keys() - OF_OBJECTS):
        raise TextError(f"{name}: {unknown[0]} of all arguments cannot be followed in this model's format of calls")
    if schema.get("type", "object") != "object" or not isinstance(properties, dict) or not _texts(required):
        raise TextError(f"{name}: the schema must be that of an object")
    if ELSEWHERE.search(json.dumps(schema)):
        raise TextError(f"{name}: of references those to $defs can be followed in this model's format of calls")
    other = schema.get("additionalProperties", True)
    properties = {**properties, **{key: other for key in required if key not in properties}}
    for key in properties:
        if not KEY.fullmatch(key):
            raise TextError(f"{name}: {key[:64]!r} cannot be the name of an argument in this model's format of calls")
    return properties, required


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
