"""The group of workers that serves one model: started together, watched, restarted together.

Ranks of a group share their fate: when one ends, all are killed and a new epoch begins with a new group (rule M).
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import msgspec

from aiollm.fleet.link import Link
from aiollm.fleet.record import FROM_WORKER, TO_WORKER, Recorder
from aiollm.fleet.standstill import standstill
from aiollm.fleet.trace import Tracer
from aiollm.wire.messages import (
    Alive,
    Failed,
    Fatal,
    FromWorker,
    Loading,
    Profile,
    Profiled,
    Ready,
    Result,
    Setup,
    Stop,
    Update,
    WorkerSettings,
    encoder,
)
from aiollm.wire.vocabulary import Vocabulary

T = TypeVar("T")

log = logging.getLogger(__name__)

WINDOW = 600.0  # seconds in which deaths are counted against the limit
STOP_SECONDS = 5.0


class Listener(Protocol):
    """Whom the workers serve: the engine."""

    @property
    def pulse(self) -> int | None:
        """How many signs of life came from the workers; None while they have nothing to do."""

    def on_loading(self, loading: Loading) -> object: ...

    def on_ready(self, ready: Ready, workers: "Fleet") -> object: ...

    def on_message(self, message: Result | Failed) -> object: ...

    def on_alive(self) -> object:
        """A worker that has published nothing for a while is well."""

    def on_death(self) -> object:
        """The group is gone; the next one serves another epoch."""

    def on_stopped(self, error: str) -> object: ...


class Fleet:
    """`settings` are those of every rank, but for its rank. A group that stands still for `step_timeout` seconds is
    ended. `on_stopped` is called once, when no worker comes back."""

    def __init__(
        self,
        engine: Listener,
        settings: WorkerSettings,
        max_restarts: int,
        step_timeout: float,
        record: str | None = None,
        trace: str | None = None,
        on_loading: Callable[[Loading], None] = lambda loading: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        on_stopped: Callable[[str], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._vocabulary: Vocabulary | None = None
        self._settings = settings
        self._max_restarts = max_restarts
        self._step_timeout = step_timeout
        self._watching: asyncio.Task[None] | None = None
        self._recorder = _writing("--record", Recorder, record)
        self._tracer = _writing("--trace", Tracer, trace)
        self._on_loading = on_loading
        self._on_ready = on_ready
        self._on_stopped = on_stopped
        self._links: list[Link] = []
        self._rendezvous = ""
        self._spawned = False
        """They know nothing yet."""
        self._ready: list[Ready | None] = []
        self._epoch = 0
        self._deaths: list[float] = []
        self.restarted: float | None = None
        """When a group last began to take the place of one that had ended."""
        self._served = False
        self._stopping = False
        self._broken = False
        self._failure = ""
        self._profile: asyncio.Future[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        return [link.process.pid for link in self._links]

    def spawn(self) -> None:
        """Start the processes of a group: they import what they need, and wait for what `start` tells them."""
        ranks = self._settings.ranks
        # Where ranks meet: a file that no folder holds, so that nothing stays of it whoever is killed.
        meeting = [os.memfd_create("aiollm-ranks", os.MFD_CLOEXEC)] if ranks > 1 else []
        self._rendezvous = f"/proc/self/fd/{meeting[0]}" if meeting else ""
        logs = [os.pipe() for _ in range(1, ranks)]
        self._epoch += 1
        if self._tracer is not None:
            self._tracer.begin(self._epoch)
        self._broken = False
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
                    meeting,
                    lambda body, message, rank=rank: self._on_message(rank, body, message),  # type: ignore[misc]
                    self._on_exit,
                )
            )
        for fd in (*meeting, *(end for ends in logs for end in ends)):
            os.close(fd)
        self._spawned = True

    def start(self, vocabulary: Vocabulary | None = None) -> None:
        """Have a group load what it serves; the engine hears of its progress. Groups after the first have its
        `vocabulary`."""
        self._vocabulary = vocabulary or self._vocabulary
        if not self._spawned:
            self.spawn()
        self._spawned = False
        for rank, link in enumerate(self._links):
            settings = msgspec.structs.replace(self._settings, rank=rank, rendezvous=self._rendezvous)
            setup = Setup(self._epoch, settings, self._vocabulary if rank == 0 else None)  # whose draws count
            self._send(link, encoder.encode(setup), record=rank == 0)

    @property
    def tracing(self) -> bool:
        return self._tracer is not None

    def trace(self, path: str, rows: Mapping[int, int]) -> None:
        """Begin a trace in the midst of an epoch; `rows` have the generation of each row that the workers know. Raises
        OSError where the file cannot be written."""
        self._tracer = Tracer(path)
        self._tracer.begin(self._epoch, rows)

    def end_trace(self) -> None:
        if self._tracer is not None:
            self._tracer.close()
        self._tracer = None

    @property
    def profiling(self) -> bool:
        return self._profile is not None

    def profile(self, steps: int, with_stack: bool) -> asyncio.Future[bytes]:
        """What rank 0's worker does in its next iterations, as a gzipped Chrome trace, once they are over or
        `end_profile` was called; RuntimeError where it cannot be had. Not while `profiling`, nor before Ready."""
        self._profile = asyncio.get_running_loop().create_future()
        self._send(self._links[0], encoder.encode(Profile(steps, with_stack)))
        return self._profile

    def end_profile(self) -> None:
        """Have the worker answer with what there is; until it does, there is no other profile."""
        if self._profile is not None:
            self._send(self._links[0], encoder.encode(Profile(0)))

    # The engine's side

    def send(self, update: Update) -> None:
        body = encoder.encode(update)
        if self._tracer is not None:
            self._tracer.sent(update, len(body))
        for rank, link in enumerate(self._links):
            self._send(link, body, update.number, record=rank == 0)

    def applied(self, number: int) -> None:
        """Rank 0 published an iteration, so every rank has launched it, and copied what it applied."""
        for link in self._links:
            link.applied(number)

    async def stop(self) -> None:
        """Let the workers finish what they launched; kill them after a few seconds, or at once while they load."""
        self._stopping = True
        if not all(self._ready):
            self.kill()
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
        self.end_trace()

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
        if isinstance(message, Profiled):
            self._profiled(message.trace, message.error)
            return
        if rank == 0 and self._recorder is not None:
            self._recorder.keep(FROM_WORKER, body)
        if isinstance(message, Result | Failed):
            self._take(message)
        elif isinstance(message, Loading):
            if rank == 0:
                self._engine.on_loading(message)
                self._on_loading(message)
        elif isinstance(message, Ready):
            self._ready[rank] = message
            if all(self._ready) and (first := self._ready[0]) is not None:
                self._served = True
                self._settings = msgspec.structs.replace(
                    self._settings, slots=first.slots, max_length=first.max_length, again=True
                )  # a later group has the sizes that requests were admitted by
                self._engine.on_ready(first, self)
                self._watching = asyncio.create_task(self._watch())
                self._on_ready(first)
        elif isinstance(message, Alive):
            self._engine.on_alive()
        elif isinstance(message, Fatal):
            if self._served or self._failure not in ("", message.error):  # the reason of a failed start is told later
                log.error("worker %d: %s", rank, message.error)
            self._failure = self._failure or message.error
            self._links[rank].kill()  # its last word: what is left of it might wait for ranks that are gone

    async def _watch(self) -> None:
        await standstill(lambda: self._engine.pulse, self._step_timeout)
        self._failure = f"nothing came from the worker for {self._step_timeout:g} s, see --step_timeout"
        self.kill()

    def _take(self, message: Result | Failed) -> None:
        """Hand results to the engine. A result it could not take is lost tokens: nothing that this group published
        after it may be taken, and running requests start a new epoch."""
        if self._broken:
            return
        if self._tracer is not None:
            self._tracer.received(message)
        try:
            self._engine.on_message(message)
        except Exception as error:
            log.exception("the engine could not take a result")
            self._broken = True
            self._failure = self._failure or f"the engine could not take a result: {error}"
            self.kill()

    def _profiled(self, trace: bytes, error: str) -> None:
        profile, self._profile = self._profile, None
        if profile is None or profile.done():  # whoever asked has left
            return
        if error:
            profile.set_exception(RuntimeError(error))
        else:
            profile.set_result(trace)

    def _on_exit(self, link: Link, status: int) -> None:
        if not self._failure or (status < 0 and not link.killed):  # what the other ranks say of it is a consequence
            self._failure = f"a worker process {_ending(status)}"
        if any(not other.closed for other in self._links):
            if not self._stopping:
                self.kill()
            return
        if self._watching is not None:
            self._watching.cancel()
        self._profiled(b"", self._failure)
        if self._stopping:
            return
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < WINDOW] + [now]
        self._engine.on_death()
        if not self._served:
            self._give_up(self._failure)
        elif len(self._deaths) > self._max_restarts:
            self._give_up(f"{self._failure}; that was death {len(self._deaths)}, see --max_restarts")
        else:
            log.error("%s; starting it again, running requests go on", self._failure)
            self.restarted = now
            try:
                self.start()
            except OSError as error:
                self._give_up(f"{self._failure}; it cannot be started again: {error}")

    def _give_up(self, error: str) -> None:
        self._stopping = True
        self.kill()
        self._engine.on_stopped(error)
        self._on_stopped(error)


def _writing(flag: str, kind: Callable[[str], T], path: str | None) -> T | None:
    """What writes the file that a flag asks for. Raises OSError, which names the flag."""
    try:
        return kind(path) if path else None
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be written: {error.strerror}") from error


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    return f"was ended by signal {-status} ({signal.strsignal(-status)}){hint}"
