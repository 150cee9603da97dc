"""POST /v1/embeddings: the hidden state of each input's last token behind the final norm, scaled to length 1."""

import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from aiohttp import web
from msgspec import Meta, Raw
from numpy.typing import NDArray

from aiollm.api import body
from aiollm.api.answer import answer
from aiollm.api.caller import Caller, caller
from aiollm.api.choice import Choice, Output
from aiollm.api.convert import output_limit, prompt_array, sampling_params, truncated
from aiollm.api.decoding import decode
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation, Prompt, check_kind
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import INT32, GenerationRequest, Kept, Prompts, Salt, check_served, prompts_of
from aiollm.api.shape import Shape, Unstreamed
from aiollm.text.folder import TextError

KIND = "embd"


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings. Each text, or list of token ids, is one input."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Kept | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: Salt | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    user: Raw = Raw()
    adapter_id: Any = None
    embed_dtype: Any = None
    input_embeds: Any = None
    lora_path: Any = None
    prompt_embeds: Any = None

    @property
    def streams(self) -> bool:
        return False


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


async def embeddings(http: web.Request) -> web.StreamResponse:
    """Inputs are computed as any prompts are; the token that each draws is dropped, and its hidden state answered."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.decoded(http, data, decode_embedding)
    generation, shape = await prepared(parts, request, caller(http))
    return await answer(http, GenerationRequest(), generation, shape)


async def prepared(parts: Parts, request: EmbeddingRequest, caller: Caller) -> tuple[Generation, Shape]:
    """What a request asks for, ready to be submitted. Raises ApiError where it cannot be run."""
    parts.served_name(request.model)
    check_kind(parts, KIND)
    parts.engine.check_room(caller.name)
    width = parts.engine.ready.hidden if parts.engine.ready is not None else 0
    if request.dimensions is not None and request.dimensions > width:
        raise invalid("dimensions", f"dimensions: the embeddings of this model have {width} numbers")
    asked = GenerationRequest(
        model=request.model, temperature=0.0, ignore_eos=True, cache_salt=request.cache_salt, priority=request.priority,
        truncate_prompt_tokens=request.truncate_prompt_tokens, truncation_side=request.truncation_side,
        user=request.user,
    )  # fmt: skip
    listed = await body.in_thread_if(len(request.input) > body.THREAD_IDS, prompts_of, "input", request.input)
    if len(listed) > parts.settings.max_choices:
        raise invalid("input", f"input: at most {parts.settings.max_choices} inputs in one request")
    ids = await _ids(parts, request, listed)
    prompts = await body.in_thread_if(sum(map(len, ids)) > body.THREAD_IDS, _prompts, parts, asked, ids)
    generation = Generation(parts, asked, KIND, prompts, caller)
    return generation, EmbeddingShape(request, generation)


def decode_embedding(data: bytes) -> EmbeddingRequest:
    """Raises ApiError where the body is not a request for embeddings."""
    request = decode(_DECODER, data)
    check_served(request)
    for name in ("normalize", "use_activation"):
        if getattr(request, name) is False:
            raise invalid(name, f"{name}: the vectors of this server have the length 1", "unsupported_field")
    return request


async def _ids(parts: Parts, request: EmbeddingRequest, listed: list[str | list[int]]) -> list[list[int]]:
    """Those of each input; inputs are all texts or all lists. Raises ApiError for a text that cannot be read."""
    texts = [each for each in listed if isinstance(each, str)]
    if not texts:
        return [each for each in listed if isinstance(each, list)]
    try:
        return await parts.tokenizer.encode_many_async(texts, request.add_special_tokens is not False, typed=True)
    except TextError as error:
        raise invalid("input", f"input: {error}") from error


def _prompts(parts: Parts, asked: GenerationRequest, listed: list[list[int]]) -> list[Prompt]:
    """Raises ApiError for an input that cannot run."""
    sampling = msgspec.structs.replace(sampling_params(parts, asked, 1, -1, -1), embed=True)
    arrays = [truncated(parts, asked, prompt_array(parts, ids, "input"), 0, None) for ids in listed]
    for array in arrays:
        output_limit(parts, len(array), 0, None, "input")
    return [Prompt(array, sampling, Output(discard=True)) for array in arrays]


class EmbeddingShape(Unstreamed):
    """answer.Shape of embeddings."""

    def __init__(self, request: EmbeddingRequest, generation: Generation) -> None:
        self._request, self._generation = request, generation

    def whole(self) -> dict[str, Any]:
        request, generation, found = self._request, self._generation, []
        for choice in generation.choices:
            numbers = vector(choice, request.dimensions)
            shown: Any = numbers.tolist()
            if request.encoding_format == "base64":
                shown = base64.b64encode(numbers.astype("<f4").tobytes()).decode()
            found.append({"object": "embedding", "index": choice.index, "embedding": shown})
        tokens = generation.usage.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": found, "model": generation.model, "usage": usage}


def vector(choice: Choice, dimensions: int | None) -> NDArray[np.float32]:
    """What a choice that has ended is answered with."""
    assert choice.request.hidden is not None, "a token comes with its hidden state"
    return unit(choice.request.hidden[:dimensions])


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector scaled to length 1; zeros stay."""
    wide = vector.astype(np.float64)
    return (wide / max(np.linalg.norm(wide), np.finfo(np.float64).tiny)).astype(np.float32)
