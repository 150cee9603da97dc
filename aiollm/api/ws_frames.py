"""The frames of the chat socket as types: JSON objects in text frames, told apart by `type`."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aiollm.api.errors import ApiError, invalid
from aiollm.api.generation import Usage

Id = Annotated[str, Meta(min_length=1, max_length=64)]
"""Drawn by the client; names one conversation while it runs, and may be used again after its end."""


class Chat(msgspec.Struct, frozen=True, tag_field="type", tag="chat"):
    """Start an answer. The other fields are those of POST /v1/chat/completions, and read by the same decoder."""

    id: Id


class Cancel(msgspec.Struct, frozen=True, tag_field="type", tag="cancel"):
    """End an answer now; ignored where it has ended already."""

    id: Id


class Ping(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    """Asks for a `pong`: for programs that cannot send the protocol's own pings, as in browsers."""


class Hello(msgspec.Struct, frozen=True, tag_field="type", tag="hello"):
    """The first frame of every socket."""

    model: str
    max_model_len: int
    """Tokens of a prompt and its answer together."""
    max_conversations: int
    """How many may run at once on one socket."""
    max_frame_bytes: int


class Start(msgspec.Struct, frozen=True, tag_field="type", tag="start"):
    """The prompt is computed: `cached_tokens` of its `prompt_tokens` came from the prefix cache."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    request_id: str
    """By which others may end the answer, as over HTTP."""


class Delta(msgspec.Struct, frozen=True, tag_field="type", tag="delta", omit_defaults=True):
    """More text; `tokens` were generated so far. `tool_calls` are pieces, as in OpenAI's deltas."""

    id: str
    text: str
    tokens: int
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = []


class Done(msgspec.Struct, frozen=True, tag_field="type", tag="done"):
    """The answer's last frame; `finish_reason` is stop, length, tool_calls or cancelled.

    `ttft_ms` are the milliseconds from the `chat` frame to the first token, `tokens_per_s` is the pace after it; null
    where there was no first token, or none after it.
    """

    id: str
    finish_reason: str
    usage: Usage | None
    """None where a conversation was cancelled before its prompt was read."""
    ttft_ms: float | None
    tokens_per_s: float | None


class Error(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """A refusal or failure in OpenAI's shape; with an id it ends that conversation, with null it is the socket's."""

    id: str | None
    error: dict[str, Any]


class Pong(msgspec.Struct, frozen=True, tag_field="type", tag="pong"):
    """Answers `ping`."""


FromClient = Chat | Cancel | Ping
FromServer = Hello | Start | Delta | Done | Error | Pong


class _Named(msgspec.Struct, frozen=True):
    id: Id | None = None


_FRAME: msgspec.json.Decoder[FromClient] = msgspec.json.Decoder(FromClient)
_NAMED = msgspec.json.Decoder(_Named)


def decode(data: bytes) -> FromClient:
    """Raises ApiError for what is no frame; its code is invalid_json where `data` is not even JSON."""
    try:
        return _FRAME.decode(data)
    except msgspec.ValidationError as error:
        raise invalid(None, f"this is no frame of the chat socket: {error}", "invalid_frame") from error
    except RecursionError:
        raise invalid(None, "the JSON of the frame is nested too deeply", "invalid_json") from None
    except msgspec.DecodeError as error:
        raise invalid(None, f"the frame is not valid JSON: {error}", "invalid_json") from error


def named(data: bytes) -> str | None:
    """The id of a frame that `decode` refused, if it has a proper one."""
    try:
        return _NAMED.decode(data).id
    except (msgspec.DecodeError, RecursionError):
        return None


def failed(id: str | None, error: ApiError) -> Error:
    inner: dict[str, Any] = error.body()["error"]
    return Error(id, inner)
