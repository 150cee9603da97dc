"""What a request lets its output be: grammars under the names of all who have one, allowed ids, banned words."""

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from aiollm.api.convert import check_ids
from aiollm.api.errors import invalid
from aiollm.api.grammars import check_size
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest, ResponseFormat
from aiollm.grammar.llguidance import GrammarError
from aiollm.text.folder import TextError
from aiollm.wire.sampling import AllowedIds, BannedWords, Constraint, Grammar, Thoughts

KINDS = ("json", "regex", "choice", "grammar", "json_object")  # of structured_outputs
ANY_OBJECT: dict[str, Any] = {"type": "object"}

Asked = tuple[str, Callable[[], Grammar]]
"""A field, and what makes its grammar: beside the event loop, since it may be long. It may raise GrammarError."""


def asked(*fields: tuple[str, str, Any]) -> list[Asked]:
    """(field, kind, value) of the fields that were given, as grammars; null and false are none. A list has the texts of
    which the output is one."""
    return [(name, partial(_grammar, kind, value)) for name, kind, value in fields if value is not None]


def _grammar(kind: Any, value: Any) -> Grammar:
    if isinstance(value, list):
        check_size(sum(map(len, value)))
        return Grammar(kind, "|".join(map(re.escape, value)))
    return Grammar(kind, value if isinstance(value, str) else msgspec.json.encode(value).decode())


def asked_grammars(request: GenerationRequest) -> list[Asked]:
    """The grammars that a request asks for, by field. Raises ApiError for what is no grammar."""
    outputs, name = request.structured_outputs, "structured_outputs"
    grammars = asked(
        ("response_format", "json", _response_schema(request.response_format)),
        ("guided_json", "json", request.guided_json),
        ("guided_regex", "regex", request.guided_regex),
        ("guided_choice", "regex", request.guided_choice),
        ("guided_grammar", "ebnf", request.guided_grammar),
        ("regex", "regex", request.regex),
        ("ebnf", "ebnf", request.ebnf),
        ("grammar", "ebnf", request.grammar),
        ("json_schema", "json", request.json_schema),
        ("regular_constraint", "regex", request.regular_constraint),
    )
    if outputs is None:
        return grammars
    for field in msgspec.structs.fields(outputs):
        if field.type is Any and getattr(outputs, field.name) not in (None, False):
            raise invalid(name, f"{name}.{field.name}: this server does not support this field", "unsupported_field")
    if all(getattr(outputs, kind) is None for kind in KINDS):
        raise invalid(name, f"{name}: one of {', '.join(KINDS)} is required")
    return grammars + asked(
        (f"{name}.json", "json", outputs.json),
        (f"{name}.regex", "regex", outputs.regex),
        (f"{name}.choice", "regex", outputs.choice),
        (f"{name}.grammar", "ebnf", outputs.grammar),
        (f"{name}.json_object", "json", ANY_OBJECT if outputs.json_object else None),
    )


async def constraints(
    parts: Parts, request: GenerationRequest, grammars: Sequence[Asked], thoughts: Thoughts | None = None
) -> tuple[Constraint, ...]:
    """What the tokens of a request have to follow: one of `grammars` at most, behind its `thoughts`, which is tried out
    here, and the fields that name tokens. Raises ApiError."""
    found: list[Constraint] = []
    if len(grammars) > 1:
        (first, _), (second, _), *_ = grammars
        raise invalid(_field(second), f"{second}: a second constraint beside {first}; give one of the two")
    for field, make in grammars:
        if request.ignore_eos:
            raise invalid("ignore_eos", f"ignore_eos: not together with {field}, whose end is an end of sequence")
        if request.allowed_token_ids is not None:
            raise invalid("allowed_token_ids", f"allowed_token_ids: a second constraint beside {field}")
        try:
            grammar = await asyncio.to_thread(make)
            await parts.grammars.check(grammar)
            whole = msgspec.structs.replace(grammar, thoughts=thoughts)
            found.append(await parts.grammars.check(whole))
        except GrammarError as error:
            faulty = "tools" if field == "tool_choice" else field  # what calls consist of is said there
            raise invalid(_field(faulty), f"{faulty}: {error}") from error
    if (allowed := request.allowed_token_ids) is not None:
        check_ids(parts, "allowed_token_ids", allowed)
        found.append(AllowedIds(tuple(allowed)))
        ends = {*parts.tokenizer.eos_ids, *(request.stop_token_ids or ())}
        if (least := request.min_tokens or request.min_new_tokens) and ends.issuperset(allowed):
            message = f"min_tokens: none of allowed_token_ids goes on to {least} tokens, each of them ends the answer"
            raise invalid("min_tokens", message)
    if request.bad_words:
        banned = await _banned(parts, request.bad_words)
        found += [BannedWords(banned)] if banned else []
        if allowed is not None and set(allowed) <= {ids[0] for ids in banned if len(ids) == 1}:
            raise invalid("bad_words", "bad_words: they ban all of allowed_token_ids")
    return tuple(found)


def _field(path: str) -> str:
    """The field of the request that holds it."""
    return path.partition(".")[0]


async def _banned(parts: Parts, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is cut at the begin of a text, and behind a space."""
    texts = [text for word in words for text in (word, " " + word.lstrip())]
    try:
        found = await parts.tokenizer.encode_many_async(texts, False)
    except TextError as error:
        raise invalid("bad_words", f"bad_words: {error}") from error
    return tuple(dict.fromkeys(tuple(ids) for ids in found if ids))


def _response_schema(given: ResponseFormat | None) -> Any:
    if given is None or given.type == "text":
        return None
    field = "response_format"
    if given.type not in (None, "json_object", "json_schema"):
        text = f"{field}: type {given.type[:40]!r} is not supported; text, json_object and json_schema are"
        raise invalid(field, text, "unsupported_field")
    named = None if given.json_schema is None else given.json_schema.schema
    if named is not None and given.schema is not None:
        raise invalid(field, f"{field}.schema: another name of json_schema.schema; give one of the two")
    schema = given.schema if named is None else named
    if schema is not None:
        return schema
    if given.type == "json_object":
        return ANY_OBJECT
    raise invalid(field, f"{field}: json_schema.schema is required" if given.type else f"{field}: type is required")
