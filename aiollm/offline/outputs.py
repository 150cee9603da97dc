"""What programs give and get: sampling parameters, and outputs with the names that vLLM's have."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from aiollm.api.choice import Choice, Delta
from aiollm.api.embeddings import vector
from aiollm.api.generation import Generation
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest
from aiollm.api.turn import Turn
from aiollm.text.parsers.source import Content, Event


class SamplingParams(GenerationRequest, frozen=True, kw_only=True, omit_defaults=True):
    """The fields that chat and text completions share. What is left out is the server's default: the model's
    generation_config.json, 16 tokens after a prompt, all that fit in a chat."""

    logprobs: int | None = None
    """None: no logprobs; n >= 0: that of each drawn token, and the n likeliest tokens."""

    def __post_init__(self) -> None:
        """JSON cannot say what is no finite number."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            for number in value.values() if isinstance(value, dict) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name}: {number} is not a finite number")


class Logprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None
    """1 is the likeliest; None for a drawn token that is not among the likeliest asked for."""
    decoded_token: str


class CompletionOutput(msgspec.Struct, frozen=True):
    """One choice of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    """Those included that end the output."""
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    """By token id, for each of `token_ids`; None where they were not asked for."""
    finish_reason: str | None
    """stop or length; None while it goes on."""
    stop_reason: int | str | None
    """The stop string or stop id that ended it; None for the end of sequence."""
    message: dict[str, Any] | None = None
    """What the whole text says, as a server tells it: content, reasoning, tool_calls. None where it goes on, or answers
    no conversation."""


class RequestOutput(msgspec.Struct, frozen=True):
    """One prompt and its choices."""

    request_id: str
    prompt: str | None
    """As the model sees it; None where it was given as ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """By token id, for each of `prompt_token_ids` but the first; None where they were not asked for."""
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    """Tokens of the prompt that were computed before."""


class EmbeddingOutput(msgspec.Struct, frozen=True):
    embedding: list[float]
    """Of length 1."""


class EmbeddingRequestOutput(msgspec.Struct, frozen=True):
    """One prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int
    """Tokens of the prompt that were computed before."""


def embedded(generation: Generation, dimensions: int | None) -> EmbeddingRequestOutput:
    """The output of a whole generation of one prompt."""
    (choice,) = generation.choices
    request = choice.request
    output = EmbeddingOutput(vector(choice, dimensions).tolist())
    return EmbeddingRequestOutput(generation.id, output, request.prompt.tolist(), True, request.cached_tokens)


class Collector:
    """The output of a generation, as far as it has come."""

    def __init__(self, generation: Generation, parts: Parts, prompt: Any, params: SamplingParams) -> None:
        """`prompt` is text, ids or messages."""
        self._generation, self._params = generation, params
        self._tokenizer = tokenizer = parts.tokenizer
        self._ids: list[int] = generation.choices[0].request.prompt.tolist()
        self._prompt = prompt if isinstance(prompt, str) else None
        self._turn = Turn(parts.speech.calls) if prompt and isinstance(prompt[0], dict) else None
        if self._turn is not None:
            self._prompt = tokenizer.decode(self._ids, skip_special_tokens=False)
        self._texts = [""] * len(generation.choices)
        self._events: list[list[Event]] = [[] for _ in generation.choices]
        self._logprobs: list[list[dict[int, Logprob]]] = [[] for _ in generation.choices]
        self._sums = [0.0] * len(generation.choices)

    def output(self) -> RequestOutput:
        """All that has come."""
        choices = self._generation.choices
        return RequestOutput(
            self._generation.id,
            self._prompt,
            self._ids,
            self._prompt_logprobs(choices[0]) if self._params.prompt_logprobs is not None else None,
            [self._choice(choice, choice.take() or Delta("")) for choice in choices],
            all(choice.finish is not None for choice in choices),
            choices[0].request.cached_tokens,
        )

    def _choice(self, choice: Choice, delta: Delta) -> CompletionOutput:
        index, finish, asked = choice.index, choice.finish, self._params.logprobs is not None
        self._texts[index] += delta.text
        self._events[index] += [Content(delta.text)] if delta.events is None else delta.events
        self._sums[index] += sum(entry.logprob or 0.0 for entry in delta.entries)
        self._logprobs[index] += [self._entry(entry.id, entry.logprob or 0.0, entry.top) for entry in delta.entries]
        return CompletionOutput(
            index,
            self._texts[index],
            choice.ids,
            self._sums[index] if asked else None,
            list(self._logprobs[index]) if asked else None,
            finish.reason if finish is not None else None,
            finish.stop if finish is not None else None,
            self._turn.message(self._events[index]) if self._turn is not None and finish is not None else None,
        )

    def _prompt_logprobs(self, choice: Choice) -> list[dict[int, Logprob] | None]:
        scores = self._generation.first_of(choice).prompt_scores
        entries = (self._entry(self._ids[token.position], token.logprob, token.top, token.rank) for token in scores)
        return [None, *entries]

    def _entry(
        self, id: int, logprob: float, top: Sequence[tuple[int, float]], own: int | None = None
    ) -> dict[int, Logprob]:
        """The token itself first, as in vLLM; it may be one of the likeliest, or else has its `own` rank."""
        ranks: dict[int, int | None] = {id: own} | {other: rank for rank, (other, _) in enumerate(top, 1)}
        text = self._tokenizer.token_text
        return {other: Logprob(value, ranks[other], text(other)) for other, value in ((id, logprob), *top)}
