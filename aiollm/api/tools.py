"""The functions of a chat request: what the template sees of them, and how the model's output is read."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aiollm.api.choice import Output
from aiollm.api.errors import invalid
from aiollm.api.grammars import check_size
from aiollm.api.messages import NamedTool, Tool
from aiollm.api.parts import Parts
from aiollm.api.schema import ChatRequest
from aiollm.api.structured import Asked
from aiollm.grammar.llguidance import GrammarError
from aiollm.text.folder import TextError
from aiollm.text.parsers.formats import Speech
from aiollm.text.parsers.source import Content, Event, Reasoning
from aiollm.wire.sampling import Grammar, Tag

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


def offered(request: ChatRequest) -> Sequence[Tool]:
    """The functions that the model may call; with tool_choice none it does not hear of them."""
    return request.tools or () if request.tool_choice != "none" else ()


def check_choice(parts: Parts, request: ChatRequest) -> None:
    """Raises ApiError where calls could not be told from text."""
    if offered(request) and parts.speech.calls is None:
        message = "tools: this model's chat template has no format of calls that is known here; see --tool_call_parser"
        raise invalid("tools", message, "unsupported_field")


def grammars(parts: Parts, request: ChatRequest, guard: bool) -> list[Asked]:
    """The grammar of the calls that are demanded, or with `guard` of text in which those of strict functions are
    proper ones, if there is one to follow; by field.

    Text is not guarded in formats that have no grammar of it.
    """
    tools, choice, speech = _schemas(request), request.tool_choice, parts.speech
    if not tools:
        return []
    if choice in (None, "auto"):
        strict = {tool.function.name for tool in offered(request) if tool.function.strict}
        if not (guard and strict and speech.guards):
            return []
        schemas = {name: schema if name in strict else {} for name, schema in tools.items()}
        return [("tools", lambda: _grammar(schemas, lambda: speech.guarded(schemas, _tags(parts, speech))))]
    if isinstance(choice, NamedTool):
        tools = {choice.function.name: tools[choice.function.name]}
    one = isinstance(choice, NamedTool) or request.parallel_tool_calls is False
    return [("tool_choice", lambda: _grammar(tools, lambda: speech.forced(tools, one, _tags(parts, speech.demanding))))]


def _tags(parts: Parts, speech: Speech) -> list[Tag]:
    """The marks of calls, as the model's tokens write them."""
    return [parts.tokenizer.tag(mark) for mark in Speech(speech.calls).marks]


def _grammar(schemas: dict[str, dict[str, Any]], lark: Callable[[], str]) -> Grammar:
    """That of text in which these schemas stand, all of them. Raises GrammarError."""
    check_size(len(msgspec.json.encode(schemas)))
    try:
        return Grammar("calls", lark())
    except TextError as error:
        raise GrammarError(str(error)) from error


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates expect them: every field is there, and those meant for servers are not."""
    return [
        {
            "type": tool.type,
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or NO_ARGUMENTS,
            },
        }
        for tool in tools
    ]


def read(output: Output, parts: Parts, request: ChatRequest, opened: bool | None) -> Output:
    """The output with a parser for the calls that it may have, and for the reasoning unless `opened` is None.

    Where calls are demanded, what is no call is one that was cut off before its name, and no content.
    """
    tools = _schemas(request)
    demanded = request.tool_choice not in (None, "none", "auto")
    spoken = parts.speech.demanding if demanded else parts.speech
    apart = opened is not None and request.separate_reasoning is not False
    speech = Speech(spoken.calls if tools else None, spoken.reasoning if apart else None)
    if speech == Speech():
        return output
    hidden: set[type[Event]] = {Reasoning} if request.include_reasoning is False else set()
    if demanded and (apart or opened is None):
        hidden.add(Content)
    one_call = speech.calls is not None and request.parallel_tool_calls is False
    return output._replace(
        parser=lambda: speech.parser(opened is True, tools, hidden, one_call),
        shown=parts.tokenizer.special_ids(speech.marks),
    )


def _schemas(request: ChatRequest) -> dict[str, dict[str, Any]]:
    return {tool.function.name: tool.function.parameters or NO_ARGUMENTS for tool in offered(request)}
