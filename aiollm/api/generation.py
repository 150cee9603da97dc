"""The choices behind one HTTP request: built together, submitted together, ended together."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from aiollm.api.caller import NOBODY, Caller
from aiollm.api.choice import Choice, Output
from aiollm.api.convert import seed_of
from aiollm.api.errors import ApiError, engine_error, invalid, too_late
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest
from aiollm.wire.sampling import SamplingParams

SCORE = "score"  # the kind of a generation that is run for a reward model's score


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
    """`choices` are ordered prompt by prompt. `changed` is set when there is something to take from one of them."""

    def __init__(
        self,
        parts: Parts,
        request: GenerationRequest,
        kind: str,
        prompts: Sequence[Prompt],
        caller: Caller = NOBODY,
    ) -> None:
        """`kind` is the prefix of the response's id. Raises ApiError where too many choices are asked for."""
        settings, n = parts.settings, request.n or 1
        if (ready := parts.engine.ready) is not None and ready.scores != (kind == SCORE):
            use = "gives scores, not text: use /get_score" if ready.scores else "is no reward model: it has no scores"
            raise ApiError(400, f"this model {use}", code="unsupported_model", param="model")
        if n > settings.max_n:
            raise invalid("n", f"n: at most {settings.max_n}")
        if n * len(prompts) > settings.max_choices:
            raise invalid("n", f"n: {n} choices of {len(prompts)} prompts are more than {settings.max_choices}")
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.model = parts.served_name(request.model)
        self.created = int(time.time())
        self.changed = asyncio.Event()
        self.n = n
        self._parts = parts
        arrived = time.monotonic()
        self.choices = [
            Choice(
                index := at * n + i,
                f"{self.id}-{index}",
                prompt.ids,
                msgspec.structs.replace(prompt.sampling, seed=seed_of(prompt.sampling.seed, i)),
                parts.tokenizer,
                prompt.output,
                namespace=request.cache_salt or "",
                arrived=arrived,
                on_text=self.changed.set if request.streams else _nothing,
                on_end=self.changed.set,
                inter_token=parts.metrics.inter_token.observe,
                kind=(self.model, prompt.sampling.max_tokens.bit_length(), getattr(request, "tools", None) is not None),
                priority=request.priority or 0,
                key=caller.key,
                patience=caller.patience,
            )
            for at, prompt in enumerate(prompts)
            for i in range(n)
        ]

    def submit(self) -> None:
        """Hand all choices to the engine, or none: EngineBusy."""
        self._parts.engine.submit(*(choice.request for choice in self.choices))

    async def complete(self) -> None:
        """Wait for the end of every choice. Raises ApiError where one failed."""
        while any(choice.finish is None for choice in self.choices):
            await self.changed.wait()
            self.changed.clear()
            if (error := self.failure()) is not None:
                raise error

    def failure(self) -> ApiError | None:
        """Why the engine gave up one of the choices, if it did."""
        for choice in self.choices:
            if choice.finish is not None and choice.finish.reason == "timeout":
                return too_late(choice.finish.error, self._parts.engine.retry_after)
            if choice.finish is not None and choice.finish.reason not in ("stop", "length"):
                available = self._parts.engine.status.state not in ("draining", "stopped")
                return engine_error(choice.finish.error or "the request was cancelled", available)
        return None

    def end(self) -> None:
        """Abort what still runs, and count every choice; call once after `submit`, whatever happened."""
        for choice in self.choices:
            if choice.finish is None:
                self._parts.engine.abort(choice.request)
            self._parts.metrics.ended(choice)

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, however many choices it has."""
        firsts = [choice.request for choice in self.choices[:: self.n]]
        prompt = sum(len(request.prompt) for request in firsts)
        generated = sum(choice.generated for choice in self.choices)
        cached = sum(request.cached_tokens for request in firsts)
        return Usage(prompt, prompt + generated, generated, {"cached_tokens": cached})

    @property
    def summary(self) -> str:
        """The generation's part of the access line."""
        usage = self.usage
        firsts = [choice.first for choice in self.choices if choice.first is not None]
        first = f"{(min(firsts) - self.choices[0].request.arrived) * 1000:.1f}ms" if firsts else "-"
        reasons = ",".join(sorted({choice.finish.reason if choice.finish else "none" for choice in self.choices}))
        return (
            f"{self.id} in={usage.prompt_tokens} out={usage.completion_tokens} "
            f"cached={usage.prompt_tokens_details['cached_tokens']} ttft={first} finish={reasons}"
        )


GENERATION = web.RequestKey("generation", Generation)


def _nothing() -> None:
    """Nobody takes text before the end."""
