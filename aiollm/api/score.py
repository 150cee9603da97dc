"""POST /get_score: LightLLM's endpoint of reward models, {"chat": ...} -> {score, prompt_tokens, finish_reason}."""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from aiollm.api import body
from aiollm.api.answer import answer
from aiollm.api.caller import caller
from aiollm.api.choice import Output
from aiollm.api.convert import output_limit, prompt_array, sampling_params
from aiollm.api.decoding import decode
from aiollm.api.errors import invalid
from aiollm.api.generation import SCORE, Generation, Prompt, check_kind
from aiollm.api.messages import Message, check_message
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import GenerationRequest, TokenId
from aiollm.api.shape import Unstreamed
from aiollm.text.folder import TextError


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`chat` is the whole conversation: text as the model was trained on it, its token ids, or messages."""

    chat: str | Annotated[list[TokenId | Message], Meta(min_length=1)]
    model: str | None = None
    multimodal_params: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(ScoreRequest)


async def get_score(http: web.Request) -> web.StreamResponse:
    """The prompt is computed as any other; the token that it draws brings the score."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.decoded(http, data, decode_score)
    check_kind(parts, SCORE)
    who = caller(http)
    parts.engine.check_room(who.name)
    asked = GenerationRequest(model=request.model, temperature=0.0, ignore_eos=True)
    context = parts.context  # refuses while the model loads
    assert context and parts.engine.ready is not None
    ids = await _encode(parts, request.chat)
    token = parts.engine.ready.score_token
    if token >= 0 and ids[-1:] != [token]:
        ids = [*ids, token]
    array = await body.in_thread_if(len(ids) > body.THREAD_IDS, prompt_array, parts, ids, "chat")
    sampling = sampling_params(parts, asked, output_limit(parts, len(array), 0, None, "chat"), -1, -1)
    generation = Generation(parts, asked, SCORE, [Prompt(array, sampling, Output(keep_entries=True))], who)
    return await answer(http, asked, generation, ScoreShape(generation))


def decode_score(data: bytes) -> ScoreRequest:
    """Raises ApiError where the body is not a request for a score."""
    request = decode(_DECODER, data)
    kinds = {isinstance(item, int) for item in request.chat if not isinstance(item, str)}
    if len(kinds) > 1:
        raise invalid("chat", "chat: token ids and messages cannot be mixed")
    for index, item in enumerate(request.chat):
        if isinstance(item, Message):
            check_message(f"chat[{index}]", item, "chat")
    if request.multimodal_params and any(request.multimodal_params.values()):
        raise invalid("multimodal_params", "multimodal_params: this model takes text only", "unsupported_field")
    return request


async def _encode(parts: Parts, chat: str | list[int | Message]) -> list[int]:
    try:
        if isinstance(chat, str):
            return await parts.tokenizer.encode_async(chat, True)
        if ids := [item for item in chat if isinstance(item, int)]:
            return ids
        messages = [item for item in chat if isinstance(item, Message)]
        text = await parts.rendered(messages, add_generation_prompt=False)
        return await parts.tokenizer.encode_async(text, False)
    except TextError as error:
        raise invalid("chat", f"chat: {error}") from error


class ScoreShape(Unstreamed):
    """answer.Shape of a score."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def whole(self) -> dict[str, Any]:
        (choice,) = self._generation.choices
        delta = choice.take()
        assert delta is not None and choice.finish is not None, "a generation that is complete has its token"
        return {
            "score": delta.entries[0].logprob,
            "prompt_tokens": self._generation.usage.prompt_tokens,
            "finish_reason": choice.finish.reason,
        }
