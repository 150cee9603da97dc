"""What a conversation is made of, as types: messages, the calls in them, and tools."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aiollm.api.errors import invalid

MAX_TOOLS = 512
MAX_TOOLS_BYTES = 512 * 1024  # of all tools as JSON
TEXTS = ("text", "input_text", "output_text")  # types of parts that are text; the last two are of OpenAI's Responses


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`text` is that of the types in TEXTS, `refusal` the text of an assistant's part of that type."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1)]
    arguments: str | dict[str, Any] | None = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call that the assistant has made."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters` is the JSON schema of its arguments, which are none where it is left out."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$(?!\n)")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice` that demands one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[str | Part], Meta(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


def text_of(part: str | Part) -> str | None:
    """The text of a part of a message, if it is there."""
    return part if isinstance(part, str) else part.refusal if part.type == "refusal" else part.text


def check_message(path: str, message: Message, param: str) -> None:
    """What holds between the fields of a message; raises ApiError."""
    if message.content is None and message.role != "assistant":
        raise invalid(param, f"{path}.content: required for the role {message.role}")
    if message.role == "tool" and not message.tool_call_id:
        raise invalid(param, f"{path}.tool_call_id: required for the role tool")
    for index, part in enumerate(message.content if isinstance(message.content, list) else []):
        if isinstance(part, str):
            continue
        if part.type not in TEXTS and (part.type, message.role) != ("refusal", "assistant"):
            raise invalid(param, f"{path}.content[{index}]: this model takes text only, not {part.type[:40]!r}")
        if text_of(part) is None:
            field = "text" if part.type in TEXTS else part.type
            raise invalid(param, f"{path}.content[{index}].{field}: this field is required")


def check_tools(tools: Sequence[Tool] | None, choice: Any) -> None:
    """What holds between a request's tools and its `tool_choice`; raises ApiError."""
    if tools is None:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice: only allowed with tools")
        return
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise invalid("tools", f"tools: two functions are called {twice}")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise invalid("tool_choice", f"tool_choice: none of tools is called {choice.function.name[:200]}")
    if len(msgspec.json.encode(tools)) > MAX_TOOLS_BYTES:
        raise invalid("tools", f"tools: all together may have {MAX_TOOLS_BYTES} bytes of JSON")
