"""/health?deep=1: whether the model computes. One token is asked for; who asks meanwhile shares the answer."""

import asyncio

import numpy as np
from aiohttp import web

from aiollm.api.choice import Output
from aiollm.api.convert import sampling_params
from aiollm.api.errors import ApiError
from aiollm.api.generation import SCORE, Generation, Prompt
from aiollm.api.parts import Parts
from aiollm.api.schema import GenerationRequest

SECONDS = 10.0


class DeepProbe:
    """From the event loop only."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises ApiError or EngineBusy where the model gives no token within SECONDS."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask())
            self._running.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._running)

    async def _ask(self) -> None:
        parts, asked = self._parts, GenerationRequest(temperature=0.0, ignore_eos=True)
        context = parts.context  # refuses while the model loads
        assert context and parts.engine.ready is not None
        sampling = sampling_params(parts, asked, 1, -1, -1)
        kind = SCORE if parts.engine.ready.scores else "health"
        generation = Generation(parts, asked, kind, [Prompt(np.zeros(1, np.int64), sampling, Output(discard=True))])
        generation.submit()
        try:
            async with asyncio.timeout(SECONDS):
                await generation.complete()
        except TimeoutError:
            message = f"the model gave no token within {SECONDS:g} s"
            raise ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "5"}) from None
        finally:
            generation.end()


DEEP = web.AppKey("deep", DeepProbe)
