"""LightLLM's native API: /generate, /generate_stream, / (either, by `stream`), /tokens, /token_load, /get_model_name.

Stop strings and stop ids stay in the text. A stream has one event for each token and no [DONE].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from aiollm.api import body
from aiollm.api.answer import answer
from aiollm.api.caller import caller
from aiollm.api.choice import Choice, Delta, Entry, Output
from aiollm.api.convert import check_ids, output_limit, prompt_array, sampling_params, shortened, too_long
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation, Prompt, Usage
from aiollm.api.logprobs import LOWEST
from aiollm.api.native_schema import (
    CommonRequest,
    NativeRequest,
    Parameters,
    TokensRequest,
    common,
    decode_native,
    decode_tokens,
)
from aiollm.api.parts import PARTS, Parts
from aiollm.api.structured import asked_grammars, constraints
from aiollm.text.folder import TextError
from aiollm.wire.sampling import Constraint, FirstIds, Healing

HEALED = 2  # tokens at the end of a prompt that are cut off to be healed, as many as LightLLM's
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
    if stream and parameters.drawn > 1:
        name = "n" if parameters.best_of is None else "best_of"
        raise invalid(name, f"{name}: a stream has one choice")
    if stream and parameters.return_all_prompt_logprobs:
        raise invalid("return_all_prompt_logprobs", "return_all_prompt_logprobs: not in a stream")
    who = caller(http)
    parts.engine.check_room(who.name)
    asked = common(parameters, stream)
    prompt = await _prompt(parts, request.inputs, parameters, asked)
    generation = Generation(parts, asked, "gen", [prompt], who)
    return await answer(http, asked, generation, NativeShape(parts, parameters, generation, prompt.output.cut))


async def _prompt(parts: Parts, inputs: str | list[int], parameters: Parameters, asked: CommonRequest) -> Prompt:
    ids = inputs if isinstance(inputs, list) else await _encode(parts, "inputs", inputs, parameters)
    array = await body.in_thread_if(len(ids) > body.THREAD_IDS, prompt_array, parts, ids, "inputs")
    for group in parameters.stop_groups:
        check_ids(parts, "stop_sequences", group)
    array = shortened(parts, array, asked.max_tokens, None)
    max_tokens = output_limit(parts, len(array), asked.max_tokens, None, "inputs")
    if max_tokens < parameters.max_tokens:
        raise too_long(parts.context, len(array), parameters.max_tokens, "inputs")
    kept, beginning = _beginning(parts, array, parameters)
    cut = array[len(kept) :].tolist()
    tells = asked.streams or parameters.return_details is True
    output = Output(
        stops=parameters.stops,
        stop_groups=[group for group in parameters.stop_groups if parameters.token_healing or len(group) > 1],
        include_stop=True,
        skip_special_tokens=parameters.skip_special_tokens is not False,
        spaces_between_special_tokens=parameters.add_spaces_between_special_tokens is not False,
        print_eos=parameters.print_eos_token is True,
        keep_entries=tells or parameters.drawn > parameters.choices,
        end_entry=tells,
        cut=cut,
    )
    constrained = beginning or await constraints(parts, asked, asked_grammars(asked))
    sampling = msgspec.structs.replace(
        sampling_params(parts, asked, max_tokens, -1, 0 if parameters.return_all_prompt_logprobs else -1, constrained),
        input_penalty=parameters.input_penalty is True,
        decay=parameters.decay((id for id in parts.tokenizer.eos_ids if id < parts.vocabulary), len(cut)),
    )
    # What was cut off is generated again, and does not count.
    least = sampling.min_tokens + len(cut) if sampling.min_tokens else 0
    lengths = {"max_tokens": sampling.max_tokens + len(cut), "min_tokens": least}
    return Prompt(kept, msgspec.structs.replace(sampling, **lengths), output)


def _beginning(
    parts: Parts, prompt: NDArray[np.int64], parameters: Parameters
) -> tuple[NDArray[np.int64], tuple[Constraint, ...]]:
    """The prompt as it is computed, and what the beginning of its output is bound to. Raises ApiError."""
    if parameters.first_allowed_tokens is not None:
        check_ids(parts, "first_allowed_tokens", parameters.first_allowed_tokens)
        return prompt, (FirstIds(tuple(parameters.first_allowed_tokens)),)
    if not parameters.token_healing:
        return prompt, ()
    tokenizer = parts.tokenizer
    if tokenizer.pieces is None:
        message = "token_healing: the tokens of this model have no text of their own"
        raise invalid("token_healing", message, "unsupported_field")
    pieces: list[bytes] = []
    for id in reversed(prompt[1:].tolist()[-HEALED:]):
        if tokenizer.is_special(id) or not tokenizer.token_bytes(id):
            break
        pieces.insert(0, tokenizer.token_bytes(id))
    return prompt[: len(prompt) - len(pieces)], (Healing(b"".join(pieces)),) if pieces else ()


async def _encode(parts: Parts, field: str, text: str, parameters: Parameters) -> list[int]:
    try:
        return await parts.tokenizer.encode_async(text, parameters.add_special_tokens is not False, typed=True)
    except TextError as error:
        raise invalid(field, f"{field}: {error}") from error


class NativeShape:
    """answer.Shape of the native API."""

    done = b""

    def __init__(self, parts: Parts, parameters: Parameters, generation: Generation, cut: Sequence[int]) -> None:
        """`cut` are the tokens at the prompt's end that are generated again."""
        self._generation = generation
        self._scores = parameters.return_all_prompt_logprobs is True
        self._details = parameters.return_details is True
        self._is_special = parts.tokenizer.is_special
        self._prompt_tokens = generation.usage.prompt_tokens + len(cut)
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
        document |= self._prompt_logprobs() if self._scores else {}
        return document | ({"tokens": _one_or_all(list(map(self._tokens, deltas)))} if self._details else {})

    def _prompt_logprobs(self) -> dict[str, Any]:
        """Each token of the prompt with what follows it, and how likely that was."""
        first = self._generation.first_of(self._generation.choices[0])
        ids = first.request.prompt.tolist()
        pairs = zip(pairwise(ids), first.prompt_scores, strict=True)
        scored = [[id, {str(next): max(LOWEST, token.logprob)}] for (id, next), token in pairs]
        return {"prompt_token_ids": ids, "prompt_logprobs": scored}

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
