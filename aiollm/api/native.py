"""LightLLM's native API: /generate, /generate_stream, / (either, by `stream`), /tokens, /token_load, /get_model_name.

Stop strings and stop ids stay in the text. A stream has one event for each token and no [DONE].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from aiohttp import web

from aiollm.api import body
from aiollm.api.answer import answer
from aiollm.api.caller import caller
from aiollm.api.choice import Choice, Delta, Entry, Output
from aiollm.api.convert import check_ids, output_limit, prompt_array, sampling_params, shortened
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation, Prompt, Usage
from aiollm.api.logprobs import LOWEST
from aiollm.api.native_schema import (
    NativeRequest,
    Parameters,
    TokensRequest,
    common,
    decode_native,
    decode_tokens,
    native_grammars,
)
from aiollm.api.parts import PARTS, Parts
from aiollm.api.schema import GenerationRequest
from aiollm.api.structured import constraints
from aiollm.text.folder import TextError

encode = msgspec.json.encode


async def generate(http: web.Request) -> web.StreamResponse:
    return await _answer(http, await _request(http), stream=False)


async def generate_stream(http: web.Request) -> web.StreamResponse:
    return await _answer(http, await _request(http), stream=True)


async def either(http: web.Request) -> web.StreamResponse:
    request = await _request(http)
    return await _answer(http, request, stream=request.stream is True)


async def tokens(http: web.Request) -> web.Response:
    """How many tokens a text has."""
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    request: TokensRequest = await body.decoded(http, data, decode_tokens)
    ids = await _encode(parts, "text", request.text, request.parameters or Parameters())
    return web.Response(body=encode({"ntokens": len(ids)}), content_type="application/json")


async def token_load(http: web.Request) -> web.Response:
    """Shares of the KV cache: what rows hold now, and what they will hold at their worst moment.

    LightLLM gives `logical_max_load` the value of `dynamic_max_load`, and so do we.
    """
    engine = http.app[PARTS].engine
    limits, core = engine.limits, engine.core
    assert core is not None, "there are limits"
    used, worst = (limits.slots - core.ledger.available) / limits.slots, core.worst() / limits.slots
    load = {"current_load": used, "logical_max_load": worst, "dynamic_max_load": worst}
    return web.Response(body=encode(load), content_type="application/json")


async def model_name(http: web.Request) -> web.Response:
    return web.Response(body=encode({"model_name": http.app[PARTS].model.names[0]}), content_type="application/json")


async def _request(http: web.Request) -> NativeRequest:
    parts = http.app[PARTS]
    data = await body.read(http, parts.body_limit, parts.settings.body_timeout)
    return await body.decoded(http, data, decode_native)


async def _answer(http: web.Request, request: NativeRequest, stream: bool) -> web.StreamResponse:
    parts = http.app[PARTS]
    parameters = request.parameters or Parameters()
    if stream and parameters.choices > 1:
        raise invalid("best_of", "best_of: a stream has one choice")
    asked = common(parameters, stream)
    prompt = await _prompt(parts, request.inputs, parameters, asked)
    generation = Generation(parts, asked, "gen", [prompt], caller(http))
    return await answer(http, asked, generation, NativeShape(parts, parameters, generation))


async def _prompt(parts: Parts, inputs: str | list[int], parameters: Parameters, asked: GenerationRequest) -> Prompt:
    ids = inputs if isinstance(inputs, list) else await _encode(parts, "inputs", inputs, parameters)
    array = await body.in_thread_if(len(ids) > body.THREAD_IDS, prompt_array, parts, ids, "inputs")
    for group in parameters.stop_groups:
        check_ids(parts, "stop_sequences", group)
    array = shortened(parts, array, asked.max_tokens, None)
    max_tokens = output_limit(parts, len(array), asked.max_tokens, None, "inputs")
    tells = asked.streams or parameters.return_details is True
    output = Output(
        stops=parameters.stops,
        stop_groups=[group for group in parameters.stop_groups if len(group) > 1],
        include_stop=True,
        skip_special_tokens=parameters.skip_special_tokens is not False,
        spaces_between_special_tokens=parameters.add_spaces_between_special_tokens is not False,
        print_eos=parameters.print_eos_token is True,
        keep_entries=tells,
        end_entry=tells,
    )
    constrained = await constraints(parts, asked, native_grammars(parameters))
    sampling = msgspec.structs.replace(
        sampling_params(parts, asked, max_tokens, -1, -1, constrained),
        input_penalty=parameters.input_penalty is True,
        decay=parameters.decay(parts.tokenizer.eos_ids),
    )
    return Prompt(array, sampling, output)


async def _encode(parts: Parts, field: str, text: str, parameters: Parameters) -> list[int]:
    try:
        return await parts.tokenizer.encode_async(text, parameters.add_special_tokens is not False)
    except TextError as error:
        raise invalid(field, f"{field}: {error}") from error


class NativeShape:
    """answer.Shape of the native API."""

    done = b""

    def __init__(self, parts: Parts, parameters: Parameters, generation: Generation) -> None:
        self._generation = generation
        self._details = parameters.return_details is True
        self._is_special = parts.tokenizer.is_special
        self._prompt_tokens = generation.usage.prompt_tokens
        self._input_usage = {
            "input_text_tokens": self._prompt_tokens, "input_audio_tokens": 0, "input_image_tokens": 0,
        }  # fmt: skip
        self._given = 0  # characters of the stream's choice
        self._told = 0  # its tokens
        self._text = ""  # was given out without a token of its own: the next one brings it

    def opening(self) -> bytes:
        return b""

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        return b"".join(self._events(delta, None))

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        assert choice.finish is not None and delta is not None and delta.entries, "the last token is told at the end"
        return b"".join(self._events(delta, choice.finish.reason))

    def usage(self, usage: Usage) -> bytes:
        return b""

    def whole(self) -> dict[str, Any]:
        choices = self._generation.choices
        deltas = [choice.take() or Delta("") for choice in choices]
        document = {
            "generated_text": [delta.text for delta in deltas],
            "count_output_tokens": _one_or_all([choice.generated for choice in choices]),
            "finish_reason": _one_or_all([choice.finish and choice.finish.reason for choice in choices]),
            "prompt_tokens": self._prompt_tokens,
            "input_usage": self._input_usage,
        }
        return document | ({"tokens": _one_or_all(list(map(self._tokens, deltas)))} if self._details else {})

    def _events(self, delta: Delta, reason: str | None) -> list[bytes]:
        """An event a token; `reason` is that of the last one, if it is the last of all."""
        texts = _texts(delta, self._given, self._text)
        self._given += len(delta.text)
        self._text = "" if delta.entries else self._text + delta.text
        events = []
        for at, (entry, text) in enumerate(zip(delta.entries, texts, strict=True), 1):
            self._told += 1
            finish = reason if at == len(texts) else None
            event = {
                "token": {
                    "id": entry.id,
                    "text": text,
                    "logprob": _logprob(entry),
                    "special": self._is_special(entry.id),
                    "count_output_tokens": self._told,
                    "prompt_tokens": self._prompt_tokens,
                },
                "generated_text": None,
                "finished": finish is not None,
                "finish_reason": finish,
                "details": None,
                "input_usage": self._input_usage,
            }
            events.append(b"data:" + encode(event) + b"\n\n")
        return events

    def _tokens(self, delta: Delta) -> list[dict[str, Any]]:
        """`tokens` of return_details."""
        total = 0.0
        found = []
        for count, (entry, text) in enumerate(zip(delta.entries, _texts(delta), strict=True), 1):
            total += _logprob(entry)
            found.append(
                {
                    "id": entry.id,
                    "text": text,
                    "logprob": _logprob(entry),
                    "cumlogprob": total / count,
                    "special": self._is_special(entry.id),
                    "count_output_tokens": count,
                    "mtp_accepted_token_num": 0,
                }
            )
        return found


def _texts(delta: Delta, begin: int = 0, before: str = "") -> list[str]:
    """The text of each entry, together the delta's with `before` at its start; `begin` is where the delta begins."""
    if not delta.entries:
        return []
    cuts = [0, *(entry.start - begin for entry in delta.entries[1:]), len(delta.text)]
    texts = [delta.text[start:end] for start, end in pairwise(cuts)]
    return [before + texts[0], *texts[1:]]


def _logprob(entry: Entry) -> float:
    return LOWEST if entry.logprob is None else max(LOWEST, entry.logprob)


def _one_or_all(values: Sequence[Any]) -> Any:
    """One choice is not a list."""
    return values[0] if len(values) == 1 else list(values)
