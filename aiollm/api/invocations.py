"""POST /invocations, SageMaker's one door: the fields of the body tell for which endpoint it is."""

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm.api import body, chat, completions, embeddings, native, score
from aiollm.api.decoding import decode, given
from aiollm.api.errors import invalid
from aiollm.api.parts import PARTS

HANDLERS: dict[str, Handler] = {
    "messages": chat.chat_completions,
    "prompt": completions.completions,
    "input": embeddings.embeddings,
    "inputs": native.either,
    "chat": score.get_score,
}
"""By the field that only this endpoint's requests have."""


class Telling(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that tell; what they hold is read by the endpoint."""

    messages: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    prompt: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    input: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    inputs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    chat: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


_TELLING = msgspec.json.Decoder(Telling)


async def invocations(http: web.Request) -> web.StreamResponse:
    """A chat, a completion, embeddings, a native request or one for a score, whichever its fields tell."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    telling = await body.decoded(http, data, decode_telling)
    http[body.READ] = data
    for field, handler in HANDLERS.items():
        if given(getattr(telling, field)):
            return await handler(http)
    raise invalid(None, f"one of these fields is required: {', '.join(HANDLERS)}", "missing_field")


def decode_telling(data: bytes) -> Telling:
    """Raises ApiError where the body is no JSON object."""
    return decode(_TELLING, data)
