"""The group of workers that serves one model: started together, watched, restarted together.

Ranks of a group share their fate: when one ends, all are killed and a new epoch begins with a new group (rule M).
"""

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable

import msgspec

from aiollm.engine.engine import Engine
from aiollm.fleet.link import Link
from aiollm.fleet.record import FROM_WORKER, TO_WORKER, Recorder
from aiollm.wire.messages import (
    Failed,
    Fatal,
    FromWorker,
    Loading,
    Ready,
    Result,
    Setup,
    Stop,
    Update,
    WorkerSettings,
    encoder,
)

log = logging.getLogger(__name__)

WINDOW = 600.0  # seconds in which deaths are counted against the limit
STOP_SECONDS = 5.0


class Fleet:
    """`settings` are those of every rank, but for its rank. `on_stopped` is called once, when no worker comes back."""

    def __init__(
        self,
        engine: Engine,
        settings: WorkerSettings,
        max_restarts: int,
        record: str | None = None,
        on_loading: Callable[[Loading], None] = lambda loading: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        on_stopped: Callable[[str], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._max_restarts = max_restarts
        self._recorder = Recorder(record) if record else None
        self._on_loading = on_loading
        self._on_ready = on_ready
        self._on_stopped = on_stopped
        self._links: list[Link] = []
        self._ready: list[Ready | None] = []
        self._deaths: list[float] = []
        self._served = False
        self._stopping = False
        self._failure = ""
        self._folder = ""

    @property
    def pids(self) -> list[int]:
        return [link.process.pid for link in self._links]

    def start(self) -> None:
        """Start a group; the engine hears of its progress."""
        ranks = self._settings.ranks
        self._folder = tempfile.mkdtemp(prefix="aiollm-")
        rendezvous = os.path.join(self._folder, "ranks")
        logs = [os.pipe() for _ in range(1, ranks)]
        self._failure = ""
        self._ready = [None] * ranks
        self._links = []
        for rank in range(ranks):
            source = logs[rank - 1][0] if rank else None
            followers = [] if rank else [write for _, write in logs]
            self._links.append(
                Link(
                    source,
                    followers,
                    lambda body, message, rank=rank: self._on_message(rank, body, message),  # type: ignore[misc]
                    self._on_exit,
                )
            )
        for read, write in logs:
            os.close(read)
            os.close(write)
        epoch = self._engine.core.epoch if self._engine.core else 1
        for rank, link in enumerate(self._links):
            settings = msgspec.structs.replace(self._settings, rank=rank, rendezvous=rendezvous)
            self._send(link, encoder.encode(Setup(epoch, settings)), record=rank == 0)

    # The engine's side

    def send(self, update: Update) -> None:
        body = encoder.encode(update)
        for rank, link in enumerate(self._links):
            self._send(link, body, update.number, record=rank == 0)

    def applied(self, number: int) -> None:
        """Rank 0 published an iteration, so every rank has launched it, and copied what it applied."""
        for link in self._links:
            link.applied(number)

    async def stop(self) -> None:
        """Let the workers finish what they launched; kill them after a few seconds."""
        self._stopping = True
        for rank, link in enumerate(self._links):
            self._send(link, encoder.encode(Stop()), record=rank == 0)
        deadline = time.monotonic() + STOP_SECONDS
        while any(not link.closed for link in self._links) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.kill()
        while any(not link.closed for link in self._links):
            await asyncio.sleep(0.01)
        if self._recorder is not None:
            self._recorder.close()

    def kill(self) -> None:
        """End every process now."""
        for link in self._links:
            link.kill()

    # The workers' side

    def _send(self, link: Link, body: bytes, number: int = 0, record: bool = False) -> None:
        if record and self._recorder is not None:
            self._recorder.keep(TO_WORKER, body)
        link.send(body, number)

    def _on_message(self, rank: int, body: bytes | memoryview, message: FromWorker) -> None:
        if rank == 0 and self._recorder is not None:
            self._recorder.keep(FROM_WORKER, body)
            self._recorder.flush()
        if isinstance(message, Result | Failed):
            self._engine.on_message(message)
        elif isinstance(message, Loading):
            if rank == 0:
                self._engine.on_loading(message)
                self._on_loading(message)
        elif isinstance(message, Ready):
            self._ready[rank] = message
            if all(self._ready) and (first := self._ready[0]) is not None:
                self._served = True
                self._settings = msgspec.structs.replace(
                    self._settings, slots=first.slots, max_length=first.max_length
                )  # a later group has the sizes that requests were admitted by
                self._engine.on_ready(first, self)
                self._on_ready(first)
        elif isinstance(message, Fatal):
            log.error("worker %d: %s", rank, message.error)
            self._failure = self._failure or message.error

    def _on_exit(self, link: Link, status: int) -> None:
        others = [other for other in self._links if not other.closed]
        if others:
            for other in others:
                other.kill()
            self._failure = self._failure or f"a worker ended with status {status}"
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._stopping:
            return
        reason = self._failure or f"the worker process ended with status {status}"
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < WINDOW] + [now]
        self._engine.on_death()
        if not self._served or len(self._deaths) > self._max_restarts:
            error = reason if not self._served else f"{reason}; that was death {len(self._deaths)}, see --max_restarts"
            self._engine.on_stopped(error)
            self._on_stopped(error)
            return
        log.error("%s; starting it again, running requests go on", reason)
        self.start()
