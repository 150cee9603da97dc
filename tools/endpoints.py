"""Writes the README's tables of endpoints and request fields: python tools/endpoints.py. A test says when they are old.

They follow from the routes and the types of requests, as /openapi.json does; lines about fields stand in
`aiollm/api/field_texts.py`, those about endpoints in `aiollm/api/openapi.py`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiohttp.typedefs import Handler

from aiollm.api import openapi, status
from aiollm.api.app import ROUTES
from aiollm.api.embeddings import EmbeddingRequest
from aiollm.api.field_texts import DEFAULTS
from aiollm.api.native_schema import NativeRequest, Parameters, TokensRequest
from aiollm.api.schema import INT32, ChatRequest, CompletionRequest
from aiollm.api.score import ScoreRequest
from aiollm.api.static import PAGE
from aiollm.api.tokenize import DetokenizeRequest, TokenizeRequest

README = Path(__file__).resolve().parent.parent / "README.md"
NAMES = ("endpoints", "fields")
TYPES: dict[type[msgspec.Struct], str] = {
    ChatRequest: "`/v1/chat/completions`",
    CompletionRequest: "`/v1/completions`",
    EmbeddingRequest: "`/v1/embeddings`",
    NativeRequest: "`/generate`, `/generate_stream`, `/`",
    Parameters: "`parameters` there and of `/tokens`",
    TokensRequest: "`/tokens`",
    ScoreRequest: "`/get_score`",
    TokenizeRequest: "`/tokenize`",
    DetokenizeRequest: "`/detokenize`",
}
WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "object"}
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": INT32}  # in lists; elsewhere it is a count
Field = dict[str, Any]


def endpoints() -> Iterator[str]:
    """A line for the paths of a handler that take the same methods: first those that take POST alone."""
    yield from ("| | | |", "|---|---|---|")
    found: dict[tuple[str, Handler], list[str]] = {}
    for path, handler in [*ROUTES["POST"].items(), *ROUTES["GET"].items()]:
        methods = ", ".join(name for name, routes in ROUTES.items() if routes.get(path) is handler)
        if path not in found.setdefault((methods, handler), []):
            found[methods, handler].append(path)
    for (methods, handler), paths in sorted(found.items(), key=lambda item: item[0][0] != "POST"):
        named = ", ".join(f"`{openapi.plain(path)}`" for path in paths)
        free = " (no key)" if handler in (status.health, status.ready, PAGE["/"]) else ""
        yield f"| {methods} | {named} | {openapi.doc(handler).text}{free} |"


def fields() -> Iterator[str]:
    """A table for each type of request, and before those of chats and completions one of what both have."""
    known = {kind: _fields(kind) for kind in TYPES}
    chat, text = known[ChatRequest], known[CompletionRequest]
    both = [name for name, row in text.items() if chat.get(name) == row]
    yield from _table(f"{TYPES[ChatRequest]} and {TYPES[CompletionRequest]}", {name: chat[name] for name in both})
    for kind, rows in known.items():
        shared = both if kind in (ChatRequest, CompletionRequest) else ()
        yield from _table(TYPES[kind], {name: row for name, row in rows.items() if name not in shared})


def _table(title: str, rows: dict[str, Sequence[str]]) -> Iterator[str]:
    yield from (f"| {title} | | values | default |", "|---|---|---|---|")
    yield from (f"| `{name}` | {' | '.join(row)} |" for name, row in rows.items() if row[0] not in ASIDE)
    yield ""
    for kind, words in ASIDE.items():
        if named := [f"`{name}`" for name, row in rows.items() if row[0] == kind]:
            yield from (f"{words}: {', '.join(named)}.", "")


ASIDE = {openapi.REFUSED: "Refused", openapi.IGNORED: "Taken and not looked at"}


def _fields(kind: type[msgspec.Struct]) -> dict[str, tuple[str, str, str]]:
    """Text, values and default of each field."""
    schema = openapi.described([kind])[1][kind.__name__]
    return {
        name: (field.get("description", ""), _values(field), _default(kind, name, field, schema.get("required", [])))
        for name, field in schema["properties"].items()
    }


def _default(kind: type[msgspec.Struct], name: str, field: Field, required: Sequence[str]) -> str:
    if name in required:
        return "required"
    words = DEFAULTS.get(f"{kind.__name__}.{name}", DEFAULTS.get(name))
    return words or ("false" if _values(field) == WORDS["boolean"] else "")


def _values(field: Field, listed: bool = False) -> str:
    """The values of a schema in words, or of what is listed; null is left out, it is the default everywhere."""
    if field == TOKEN_ID:
        return "token ids" if listed else "integer from 0"
    options = [_values(option, listed) for option in field.get("anyOf", ()) if option != {"type": "null"}]
    if options:
        return " or ".join(dict.fromkeys(options))
    if "enum" in field:
        return " or ".join(str(value) for value in field["enum"] if value is not None)
    kind = field.get("type")
    if kind == "array":
        each = _values(field.get("items") or {}, listed=True)
        return f"list{_most(field, 'Items', '')} of {each}" if each else "list"
    if kind == "string":
        return f"text{_most(field, 'Length', ' characters')}"
    return f"{WORDS.get(kind or 'object', 'object')}{_range(field)}" if kind or "$ref" in field else ""


def _most(field: Field, what: str, unit: str) -> str:
    return f" (at most {field[f'max{what}']:,}{unit})" if f"max{what}" in field else ""


def _range(field: Field) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    high = None if high is not None and high >= INT32 else high
    low = None if low is not None and low <= -INT32 else low
    if low is not None and high is not None:
        return f" {low:g} to {high:g}"
    above = field.get("exclusiveMinimum")
    words = [f"above {above:g}"] if above is not None else [f"from {low:g}"] if low is not None else []
    words += [f"up to {high:g}"] if high is not None else []
    return " " * bool(words) + ", ".join(words)


def written(text: str) -> str:
    """The README with the tables of now."""
    for name, lines in zip(NAMES, (endpoints(), fields()), strict=True):
        begin, end = f"<!-- {name}: written by tools/endpoints.py -->\n", f"<!-- end of {name} -->\n"
        table = begin + "\n" + "\n".join(lines).rstrip() + "\n\n" + end
        text = re.sub(f"(?s){re.escape(begin)}.*{re.escape(end)}", lambda _, table=table: table, text)
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
