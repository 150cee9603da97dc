"""POST /tokenize and /detokenize, with vLLM's and SGLang's names."""

from collections.abc import Sized
from itertools import chain
from typing import Annotated, cast

import msgspec
from aiohttp import web
from msgspec import Meta

from aiollm.api import body
from aiollm.api.chat import rendered_ids
from aiollm.api.convert import check_ids
from aiollm.api.decoding import decode, given
from aiollm.api.errors import invalid
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import TokenId, decode_chat
from aiollm.text.folder import TextError

THREAD_IDS = 4096  # ids that become text, or names of tokens, in 2 ms at most


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize. With `messages` the body is a chat request, of which all counts that shapes the prompt."""

    prompt: str | list[str] | None = None
    messages: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId | list[TokenId]], Meta(description="token ids, or a list of lists of them")]
    model: str | None = None
    skip_special_tokens: bool | None = None


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(http: web.Request) -> web.Response:
    """The token ids of a text, of several texts, or of a chat as the model's template writes it."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.decoded(http, data, decode_tokenize)
    parts.served_name(request.model)
    several = isinstance(request.prompt, list)
    if isinstance(request.prompt, list):
        _check_count(parts, "prompt", request.prompt)
    found = await _ids(parts, data, request)
    strs = None
    if request.return_token_strs:
        strs = await body.in_thread_if(sum(map(len, found)) > THREAD_IDS, _token_strs, parts, found)
    answer = {
        "count": list(map(len, found)) if several else len(found[0]),
        "max_model_len": parts.context,
        "tokens": found if several else found[0],
        "token_strs": strs if several or strs is None else strs[0],
    }
    return await body.json_response(answer, sum(map(len, found)))


async def detokenize(http: web.Request) -> web.Response:
    """The text of token ids, or the texts of several lists of them, as `prompt` (vLLM) and `text` (SGLang)."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request = await body.decoded(http, data, decode_detokenize)
    parts.served_name(request.model)
    texts = await body.in_thread_if(len(data) > THREAD_IDS, _texts, parts, request)
    text = texts if request.tokens and isinstance(request.tokens[0], list) else texts[0]
    return await body.json_response({"prompt": text, "text": text}, len(data))


def decode_tokenize(data: bytes) -> TokenizeRequest:
    """Raises ApiError where the body is not a request for token ids."""
    request = decode(_TOKENIZE, data)
    if request.prompt is not None and given(request.messages):
        raise invalid("messages", "messages: not together with prompt; give one of the two")
    if request.prompt is None and not given(request.messages):
        raise invalid("prompt", "prompt: give either a prompt or messages", "missing_field")
    return request


def decode_detokenize(data: bytes) -> DetokenizeRequest:
    """Raises ApiError where the body is not a request for the text of token ids."""
    request = decode(_DETOKENIZE, data)
    if len(set(map(type, request.tokens))) > 1:
        raise invalid("tokens", "tokens: token ids and lists of token ids cannot be mixed")
    return request


async def _ids(parts: Parts, data: bytes, request: TokenizeRequest) -> list[list[int]]:
    """Of each prompt."""
    if given(request.messages):
        chat = await body.in_thread_if(len(data) > body.THREAD_BYTES, decode_chat, data)
        return [(await rendered_ids(parts, chat))[1]]
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
    try:
        return await parts.tokenizer.encode_many_async(texts, request.add_special_tokens is not False, typed=True)
    except TextError as error:
        raise invalid("prompt", f"prompt: {error}") from error


def _check_count(parts: Parts, field: str, listed: Sized) -> None:
    if len(listed) > parts.settings.max_choices:
        raise invalid(field, f"{field}: at most {parts.settings.max_choices} in one request")


def _token_strs(parts: Parts, found: list[list[int]]) -> list[list[str]]:
    return [[parts.tokenizer.token_name(id) for id in ids] for ids in found]


def _texts(parts: Parts, request: DetokenizeRequest) -> list[str]:
    """Of each list of ids. Raises ApiError where one is not in the vocabulary."""
    several = bool(request.tokens) and isinstance(request.tokens[0], list)
    if several:
        _check_count(parts, "tokens", request.tokens)
    lists = cast(list[list[int]], request.tokens if several else [request.tokens])
    check_ids(parts, "tokens", chain.from_iterable(lists))
    return [parts.tokenizer.decode(ids, request.skip_special_tokens is True) for ids in lists]
