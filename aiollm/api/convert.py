"""From a checked request to what the engine takes: sampling parameters, and lengths that fit the context."""

import secrets
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aiollm.api.errors import ApiError, invalid
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest
from aiollm.wire.sampling import Constraint, SamplingParams

WRAP = 2**64
T = TypeVar("T")


def prompt_array(parts: Parts, ids: Sequence[int], param: str) -> NDArray[np.int64]:
    """Prompt ids for the engine. Raises ApiError where there are none, or one is not in the vocabulary."""
    if not ids:
        raise invalid(param, f"{param}: it has no tokens; give at least one")
    array = np.asarray(ids, np.int64)
    check_ids(parts, param, (int(array.max()),))
    return array


def truncated(
    parts: Parts, request: GenerationRequest, prompt: NDArray[np.int64], asked: int | None, default: int | None
) -> NDArray[np.int64]:
    """The end of a prompt, or its start, as long as `truncate_prompt_tokens` says; -1 leaves room for the output."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == 0:
        raise invalid("truncate_prompt_tokens", "truncate_prompt_tokens: expected at least 1, or -1 for what fits")
    most = parts.room if asked == 0 else parts.context
    if keep > most:
        message = f"truncate_prompt_tokens: {keep} is more than the {most} tokens of the context"
        raise invalid("truncate_prompt_tokens", message)
    keep = max(1, _room(parts, asked, default)) if keep == -1 else keep
    return prompt[:keep] if request.truncation_side == "right" else prompt[-keep:]


def shortened(parts: Parts, prompt: NDArray[np.int64], asked: int | None, default: int | None) -> NDArray[np.int64]:
    """A prompt that leaves room for its output, where --long_truncation_mode has it so: without its head, or its
    centre."""
    mode, room = parts.settings.long_truncation_mode, _room(parts, asked, default)
    if mode == "none" or len(prompt) <= room or room < 1:
        return prompt
    head = room // 2 if mode == "center" else 0
    return np.concatenate([prompt[:head], prompt[len(prompt) - (room - head) :]])


def _room(parts: Parts, asked: int | None, default: int | None) -> int:
    """Tokens of a prompt beside its output; where the output's length is left open, a quarter of the context is kept
    for it."""
    if asked == 0:
        return parts.room
    output = asked if asked is not None else default or parts.context // 4
    return parts.context - max(1, output)


def output_limit(parts: Parts, prompt: int, asked: int | None, default: int | None, where: str) -> int:
    """How many tokens may be generated after a prompt of `prompt` tokens: what is left of the context at most; None as
    default is all of it. Where none is asked for, one is drawn and dropped, and the prompt may fill the context.

    Raises ApiError where no token is left, or where more are asked for than the context holds.
    """
    if asked == 0:
        if prompt > parts.room:
            raise too_long(parts.room, prompt, 0, where)
        return 0
    context = parts.context
    if prompt >= context or (asked or 0) > context:
        raise too_long(context, prompt, asked or 1, where)
    return min(asked if asked is not None else default or context, context - prompt)


def too_long(context: int, prompt: int, output: int, where: str) -> ApiError:
    """In the words that clients look for."""
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + output} tokens "
        f"({prompt} in the {where}, {output} in the completion). Please shorten the {where} or the completion.",
        code="context_length_exceeded",
        param=where,
    )


def sampling_params(
    parts: Parts,
    request: GenerationRequest,
    max_tokens: int,
    top_logprobs: int,
    prompt_logprobs: int,
    constraints: tuple[Constraint, ...] = (),
) -> SamplingParams:
    """Sampling parameters of the first choice. Raises ApiError for ids outside the vocabulary and for min_tokens."""
    defaults = parts.defaults
    min_tokens = request.min_tokens or request.min_new_tokens or 0
    if min_tokens > max_tokens:
        name = "min_tokens" if request.min_tokens else "min_new_tokens"
        raise invalid(name, f"{name}: {min_tokens} is more than the {max_tokens} tokens that the answer may have")
    stop_ids = tuple(request.stop_token_ids or ())
    check_ids(parts, "stop_token_ids", stop_ids)
    check_ids(parts, "logit_bias", request.logit_bias or ())
    eos_ids = () if request.ignore_eos else tuple(sorted(id for id in parts.tokenizer.eos_ids if id < parts.vocabulary))
    top_k = _first(request.top_k, defaults.top_k, 0)
    return SamplingParams(
        max_tokens=max(1, max_tokens),  # one token is computed and dropped where none is wanted
        min_tokens=min_tokens,
        temperature=_first(request.temperature, 0.0 if request.do_sample is False else None, defaults.temperature, 1.0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=top_k if 0 < top_k < parts.vocabulary else 0,
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, request.repeat_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=request.logit_bias or {},
        seed=request.seed if request.seed is not None else secrets.randbits(63),
        stop_ids=tuple(dict.fromkeys(eos_ids + stop_ids)),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        constraints=constraints,
    )


def seed_of(seed: int, index: int) -> int:
    """The seed of choice `index` of a prompt, kept in int64."""
    return (seed + index + WRAP // 2) % WRAP - WRAP // 2


def _first(*values: T | None) -> T:
    """The first value that was given; the last one always is."""
    return next(value for value in values if value is not None)


def check_ids(parts: Parts, param: str, ids: Iterable[int]) -> None:
    """Raises ApiError where one of the ids is not in the vocabulary."""
    if (largest := max(ids, default=0)) >= parts.vocabulary:
        raise invalid(param, f"{param}: token id {largest} is outside the vocabulary of {parts.vocabulary} ids")
