"""Engine and workers without a server: started, asked, stopped. What is asked are the bodies that a server would get.

Everything from the body to the choices of its answer is the server's own code; nobody is refused for the length of a
queue, or given up for having waited in it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from aiollm import assembly, config
from aiollm.api import body, chat, completions, embeddings
from aiollm.api.caller import NOBODY, Caller
from aiollm.api.errors import invalid
from aiollm.api.generation import Generation
from aiollm.api.parts import Parts, make_parts
from aiollm.api.schema import decode_chat, decode_completion
from aiollm.api.shape import Shape
from aiollm.wire.messages import Ready

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
PREPARING = 8  # at once: long texts and templates wait for threads, and a template's time runs meanwhile
ENDLESS = 2**62


class Endpoint(NamedTuple):
    decode: Callable[[bytes], Any]
    prepared: Callable[[Parts, Any, Caller], Awaitable[tuple[Generation, Shape]]]


ENDPOINTS = {
    CHAT: Endpoint(decode_chat, chat.prepared),
    COMPLETIONS: Endpoint(decode_completion, completions.prepared),
    EMBEDDINGS: Endpoint(embeddings.decode_embedding, embeddings.prepared),
}
"""By the paths under which a server has them."""


class Session:
    """A loaded model. To be used from its event loop only."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._preparing = asyncio.Semaphore(PREPARING)

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more, "" while it can."""
        status = self.parts.engine.status
        return status.error if status.state == "stopped" else ""

    async def prepared(self, path: str, data: bytes, streams: bool = False) -> tuple[Generation, Shape]:
        """What a body asks for, ready to be submitted. Raises ApiError, as the server answers."""
        endpoint = ENDPOINTS[path]
        async with self._preparing:
            request = await body.in_thread_if(len(data) > body.THREAD_BYTES, endpoint.decode, data)
            if request.streams and not streams:
                raise invalid("stream", "stream: answers are whole here")
            return await endpoint.prepared(self.parts, request, NOBODY)

    async def completed(self, path: str, data: bytes) -> tuple[Generation, Shape]:
        """As `prepared`, run to its end. Raises ApiError or EngineBusy, as the server answers."""
        generation, shape = await self.prepared(path, data)
        generation.submit()
        try:
            await generation.complete()
        finally:
            generation.end()
        return generation, shape


@contextlib.asynccontextmanager
async def session(settings: config.Config, progress: assembly.Progress) -> AsyncIterator[Session]:
    """Load a model and start its workers; inside of the block they serve, behind it they are gone.

    `progress` is told of the loading, also from other threads. Raises HubError, TextError, OSError or ValueError for a
    model that cannot be found or read, and RuntimeError where its workers cannot start.
    """
    settings = config.resolved(settings, config.device(settings.device))
    settings = msgspec.structs.replace(settings, max_queue=ENDLESS, max_queue_tokens=ENDLESS, queue_timeout=0.0)
    engine = assembly.make_engine(settings)
    files = await assembly.find_model(settings, progress)
    started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_ready(ready: Ready) -> None:
        if not started.done():  # a later one follows the death of a worker
            started.set_result(None)

    def on_stopped(error: str) -> None:
        if not started.done():
            started.set_exception(RuntimeError(error))

    fleet = assembly.make_fleet(
        engine,
        settings,
        files,
        on_loading=lambda loading: progress(loading.phase, loading.fraction),
        on_ready=on_ready,
        on_stopped=on_stopped,
    )
    try:
        fleet.spawn()  # before the tokenizer is read: importing torch takes as long
        parts = make_parts(engine, *await assembly.read_model(settings, files))
        fleet.start(await asyncio.to_thread(lambda: parts.tokenizer.vocabulary))
        await started
        yield Session(parts)
    finally:
        engine.on_stopped(engine.error or "the model was unloaded")
        await fleet.stop()
