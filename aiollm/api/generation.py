"""The choices behind one HTTP request: built together, submitted together, ended together."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from aiollm.api.caller import NOBODY, Caller
from aiollm.api.choice import Choice, Output, Twins
from aiollm.api.convert import seed_of
from aiollm.api.errors import ApiError, engine_error, invalid, too_late
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest
from aiollm.text.detokenizer import Detokenizer
from aiollm.wire.sampling import SamplingParams

LOGGED_TOKENS = 512  # of a prompt; a long one would hold up the event loop
SCORE = "score"  # the kind of a generation that is run for a reward model's score
LISTS = {"cmpl": "prompt", "embd": "input"}  # by kind, the field that may hold several prompts
# Logprobs of prompt tokens in one answer, alternatives included; in an event of a stream, which is made on the event
# loop, at 2 us each.
MAX_SCORES, MAX_STREAMED_SCORES = 1 << 18, 1 << 13
LONG = 2000  # tokens and logprobs, from which on a document is made in a thread


class Prompt(NamedTuple):
    """One prompt, ready for the engine."""

    ids: NDArray[np.int64]
    sampling: SamplingParams
    output: Output


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int]


class Generation:
    """`choices` are what is told, ordered prompt by prompt; where more are computed than that, the best in the end.
    `changed` is set when there is something to take from one of them."""

    def __init__(
        self,
        parts: Parts,
        request: GenerationRequest,
        kind: str,
        prompts: Sequence[Prompt],
        caller: Caller = NOBODY,
    ) -> None:
        """`kind` is the prefix of the response's id. Raises ApiError where too many choices are asked for."""
        n, drawn = request.n or 1, request.drawn
        check_kind(parts, kind)
        check_choices(parts, request, len(prompts))
        _check_scores(prompts, request)
        self.id = f"{kind}-{request.own_id or uuid.uuid4().hex}"
        self.model = parts.served_name(request.model)
        self.created = int(time.time())
        self.changed = asyncio.Event()
        self.n = n
        self._plural = _choices_field(request) if drawn > 1 else LISTS.get(kind)
        self.ignored = request.ignored
        self.key, self.owner = caller.key, caller.name
        self._parts = parts
        arrived, wake = time.monotonic(), partial(parts.wakes.add, self.changed)

        def choice(prompt: Prompt, index: int, i: int, twin: Choice | None) -> Choice:
            """Choice `i` of a prompt, number `index` of all."""
            # How likely a prompt is takes computing all of it, once for all choices that need not show it.
            scores = -1 if i and not prompt.output.echo else prompt.sampling.prompt_logprobs
            seed = seed_of(prompt.sampling.seed, i)
            return Choice(
                index,
                f"{self.id}-{index}",
                prompt.ids,
                msgspec.structs.replace(prompt.sampling, seed=seed, prompt_logprobs=scores),
                parts.tokenizer,
                prompt.output,
                namespace=caller.namespace(request.salt),
                arrived=arrived,
                on_text=wake if request.streams else _nothing,
                on_end=wake,
                inter_token=_unobserved if twin is not None else parts.metrics.inter_token.observe,
                kind=(self.model, prompt.sampling.max_tokens.bit_length(), getattr(request, "tools", None) is not None),
                priority=caller.priority(request.priority),
                key=caller.name,
                patience=caller.patience,
                twin=twin,
                ignores_eos=request.ignore_eos is True,
            )

        self.choices: list[Choice] = []
        self._computed: list[Choice] = []  # those with a request of their own
        for prompt in prompts:
            first = choice(prompt, len(self.choices), 0, None)
            twin = first if prompt.sampling.temperature == 0 else None  # whatever the seed, the same is drawn
            group = [first, *(choice(prompt, len(self.choices) + i, i, twin) for i in range(1, drawn))]
            if twin is not None and drawn > 1:
                first.request.sink = Twins(group)
            self.choices += group
            self._computed += [first] if twin is not None else group
        self._drawn, self._each = self.choices, drawn

    def submit(self) -> None:
        """Hand all choices to the engine, or none: EngineBusy, or ApiError where the API key has its limits."""
        engine, key = self._parts.engine, self.key
        try:
            if key is not None:
                key.check(len(self._computed), time.monotonic(), engine.retry_after, self._plural)
            engine.submit(*(choice.request for choice in self._computed))
        except BaseException:
            for choice in self._computed:
                choice.leave()
            raise
        if key is not None:
            key.begin(len(self._computed), self.usage.prompt_tokens)

    async def complete(self) -> None:
        """Wait for the end of every choice. Raises ApiError where one failed."""
        while any(choice.finish is None for choice in self.choices):
            await self.changed.wait()
            self.changed.clear()
            if (error := self.failure()) is not None:
                raise error
        if len(self._drawn) > self.n * len(self._firsts):
            self._rank()

    def first_of(self, choice: Choice) -> Choice:
        """The choice of the same prompt that knows how likely the prompt is."""
        return self._firsts[choice.index // self.n]

    @property
    def long(self) -> bool:
        """Whether the answer would take longer to be written than the event loop should wait."""
        sizes = (len(choice.ids) * (choice.request.sampling.top_logprobs + 2) for choice in self.choices)
        scores = (len(first.request.prompt) * (first.request.sampling.prompt_logprobs + 1) for first in self._firsts)
        numbers = sum(len(choice.request.hidden) for choice in self.choices if choice.request.hidden is not None)
        return sum(sizes) + sum(scores) + numbers > LONG

    @property
    def _firsts(self) -> list[Choice]:
        """One choice of each prompt."""
        return self._drawn[:: self._each]

    def _rank(self) -> None:
        """Of each prompt's choices tell those with the likeliest tokens."""
        best: list[Choice] = []
        for at in range(0, len(self._drawn), self._each):
            group = sorted(self._drawn[at : at + self._each], key=lambda choice: -choice.mean_logprob)
            best += group[: self.n]
        for index, choice in enumerate(best):
            choice.index = index
        self.choices = best

    def failure(self) -> ApiError | None:
        """Why the engine gave up one of the choices, if it did."""
        for choice in self.choices:
            if choice.finish is not None and choice.finish.reason == "timeout":
                return too_late(choice.finish.error, self._parts.engine.retry_after)
            if choice.finish is not None and choice.finish.reason == "abort":
                return ApiError(400, "the request was cancelled", code="cancelled")
            if choice.finish is not None and choice.finish.reason == "numerical_error":
                return engine_error(choice.finish.error, True, choice.finish.reason)
            if choice.finish is not None and choice.finish.reason == "constraints":
                return invalid(None, choice.finish.error, "unsatisfiable_constraints")
            if choice.finish is not None and choice.finish.reason not in ("stop", "length"):
                available = self._parts.engine.status.state not in ("draining", "stopped")
                return engine_error(choice.finish.error, available)
        return None

    def abort(self) -> None:
        """Give up what still runs."""
        for choice in self._computed:
            if choice.finish is None:
                self._parts.engine.abort(choice.request)

    def end(self) -> None:
        """Abort what still runs, and count every choice; call once after `submit`, whatever happened."""
        self.abort()
        for choice in self._computed:
            self._parts.metrics.ended(choice)
        if self.key is not None:
            self.key.end(len(self._computed), self.usage.completion_tokens)

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, however many choices it has."""
        firsts = [choice.request for choice in self._firsts]
        prompt = sum(len(request.prompt) for request in firsts)
        generated = sum(choice.generated for choice in self._drawn)
        cached = sum(request.cached_tokens for request in firsts)
        return Usage(prompt, prompt + generated, generated, {"cached_tokens": cached})

    @property
    def summary(self) -> dict[str, object]:
        """The generation's part of a line in the access log. Times are milliseconds, of the choice that came first."""
        usage, settings = self.usage, self._parts.settings
        requests = [choice.request for choice in self._computed]
        arrived = requests[0].arrived
        began = [request.admitted for request in requests if request.admitted is not None]
        firsts = [choice.first for choice in self._computed if choice.first is not None]
        gaps = np.concatenate([np.frombuffer(choice.gaps, np.float32) for choice in self._computed])
        middle = len(gaps) // 2
        found: dict[str, object] = {
            "generation": self.id,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details["cached_tokens"],
            "output_tokens": usage.completion_tokens,
            "queue_ms": _ms(min(began) - arrived) if began else None,
            "ttft_ms": _ms(min(firsts) - arrived) if firsts else None,
            "median_gap_ms": _ms(float(np.partition(gaps, middle)[middle])) if len(gaps) else None,
            "longest_gap_ms": _ms(float(gaps.max())) if len(gaps) else None,
            "finish": ",".join(sorted({choice.finish.reason if choice.finish else "none" for choice in self.choices})),
        }
        if self.ignored:
            found["ignored"] = self.ignored
        if settings.log_prompts:
            text = Detokenizer(self._parts.tokenizer, (), skip_special_tokens=False)
            found["prompt"] = text.push(requests[0].prompt[:LOGGED_TOKENS].tolist()) + text.finish()
        return found


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def check_kind(parts: Parts, kind: str) -> None:
    """Raises ApiError where the model gives text and a score is wanted, or the other way round."""
    ready = parts.engine.ready
    if ready is not None and ready.scores != (kind == SCORE):
        use = "gives scores, not text: use /get_score" if ready.scores else "is no reward model: it has no scores"
        raise ApiError(400, f"this model {use}", code="unsupported_model", param="model")


GENERATION = web.RequestKey("generation", Generation)


def _nothing() -> None:
    """Nobody takes text before the end."""


def _unobserved(seconds: float) -> None:
    """The other choice of these tokens tells of them."""


def _choices_field(request: GenerationRequest) -> str:
    """The field that says how many choices are computed."""
    return "n" if getattr(request, "best_of", None) is None else "best_of"


def check_choices(parts: Parts, request: GenerationRequest, prompts: int) -> None:
    """Raises ApiError where too many choices are asked for."""
    settings, drawn, name = parts.settings, request.drawn, _choices_field(request)
    if drawn > settings.max_n:
        raise invalid(name, f"{name}: at most {settings.max_n} (--max_n)")
    if drawn == 1 and prompts > settings.max_choices:
        raise invalid("prompt", f"prompt: at most {settings.max_choices} prompts in one request")
    if drawn * prompts > settings.max_choices:
        raise invalid(name, f"{name}: {drawn} choices of {prompts} prompts are more than {settings.max_choices}")


def _check_scores(prompts: Sequence[Prompt], request: GenerationRequest) -> None:
    """Raises ApiError where more logprobs of prompt tokens are asked for than one answer, or event, may hold."""
    most, place = (MAX_STREAMED_SCORES, "a stream") if request.streams else (MAX_SCORES, "an answer")
    count = sum(
        len(prompt.ids) * (prompt.sampling.prompt_logprobs + 1) * (request.drawn if prompt.output.echo else 1)
        for prompt in prompts
    )
    if count > most:
        name = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
        raise invalid(name, f"{name}: {count} logprobs of prompt tokens and alternatives, {place} holds {most}")
