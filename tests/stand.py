"""A real engine and a real HTTP server in this process, over workers that answer from a script."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from echo_workers import HIDDEN, EchoWorkers

from aiollm.api.app import make_app, serve
from aiollm.api.keys import Keys
from aiollm.api.parts import PARTS, ModelInfo, Parts, Settings
from aiollm.engine.engine import Engine
from aiollm.engine.engine import Settings as EngineSettings
from aiollm.engine.policy import Conservative
from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.messages import Ready

T = TypeVar("T")
CONTEXT = 512
SLOTS = 2048
ROWS = 8
CREATED = 1700000000
MODEL = ModelInfo(("tiny", "org/tiny"), CREATED, "/models/tiny")
WAIT = 10  # seconds until a test that hangs fails


class Stand:
    """A served engine, and a client session at it."""

    def __init__(self, app: web.Application, workers: EchoWorkers, port: int, session: aiohttp.ClientSession) -> None:
        self.app = app
        self.parts: Parts = app[PARTS]
        self.engine = self.parts.engine
        self.workers = workers
        self.port = port
        self.session = session
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """The workers are ready."""
        ready = Ready(
            slots=SLOTS,
            max_length=CONTEXT,
            vocabulary=259,
            hidden=HIDDEN,
            architecture="echo",
            data_type="none",
            budget=[],
            seconds=[],
        )
        self.engine.on_ready(ready, self.workers)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer; a body of bytes is sent as it is."""
        data = {"data": io.BytesIO(body)} if isinstance(body, bytes) else {"json": body}
        async with self.session.post(self.url + path, **data, headers=headers) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: dict[str, Any]) -> bytes:
        """The whole event stream."""
        async with self.session.post(self.url + path, json={"stream": True} | body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            return await response.read()

    async def raw(self, data: bytes) -> bytes:
        """Everything that the server answers to these bytes until it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    async def refusal(self, data: bytes) -> bytes:
        """The JSON error that the server answers to these bytes, and what stands before it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.readuntil(b"}}\n")
        writer.close()
        await writer.wait_closed()
        return answer

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop turn until something holds."""
        async with asyncio.timeout(WAIT):
            while not condition():
                await asyncio.sleep(0.001)

    async def check_idle(self) -> None:
        """Nothing runs, the server answers, and every slot is free or in the index."""
        core = self.engine.core
        if core is not None:
            await self.until(lambda: core.idle)
            assert core.ledger.pool.free + core.ledger.index.total == SLOTS and core.ledger.index.pinned == 0
        self.engine.check_integrity()
        async with self.session.get(self.url + "/health") as response:
            assert response.status == 200


@contextlib.asynccontextmanager
async def stand(
    folder: Path, loading: bool = False, queue: int = 64, port: int = 0, **options: Any
) -> AsyncIterator[Stand]:
    """Serve; at the end the stand must be idle."""
    settings = EngineSettings(
        rows=ROWS, chunk_budget=128, chunk_size=64, prefix_cache=True, policy=Conservative(), queue=queue
    )
    engine = Engine(settings._replace(**options.pop("engine", {})))
    tokenizer = Tokenizer.load(str(folder), options.pop("split_special_tokens", False))
    template = ChatTemplate.load(str(folder))
    generation_config = options.pop("generation_config", {"temperature": 1.0})
    keys = Keys(options.pop("keys", ()), options.pop("key_file", None))
    app = make_app(engine, tokenizer, template, MODEL, generation_config, Settings(**options), keys)
    workers = EchoWorkers(engine, ROWS)
    runner = await serve(app, "127.0.0.1", port)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT)) as session:
            served = Stand(app, workers, runner.addresses[0][1], session)
            if not loading:
                served.start()
            yield served
            await served.check_idle()
    finally:
        await runner.cleanup()


class Runner:
    """Runs coroutines on one loop, with a stand that lives as long as the loop."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self.stand: Stand = self._runner.run(self._stack.enter_async_context(stand(folder, **options)))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it, then ask the stand to be idle."""

        async def checked() -> T:
            self.stand.workers.reset()
            async with asyncio.timeout(WAIT):
                result = await coroutine
            await self.stand.check_idle()
            return result

        return self._runner.run(checked())

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()
