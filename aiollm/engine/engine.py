"""The async shell around the core: wakes it, carries its updates to the workers and their results back.

The only file of the engine that knows the event loop. Time spent here is per iteration, not per token.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from aiollm.engine.integrity import check
from aiollm.engine.ledger import Limits
from aiollm.engine.policy import Policy
from aiollm.engine.request import Finish, Request
from aiollm.engine.scheduler import DEFAULT, Scheduler, Service
from aiollm.engine.share import WHOLE, Shares
from aiollm.engine.window import Window
from aiollm.wire.messages import Failed, FromWorker, Header, Loading, Ready, Result, Update

log = logging.getLogger(__name__)


class EngineBusy(Exception):
    """The request cannot be taken now; `reason` is loading, draining, stopped, queue_full, or rate_limit_exceeded where
    it is only this API key's requests that are too many."""

    def __init__(self, reason: str, message: str, retry_after: int | None = None) -> None:
        """`retry_after` is in seconds, None where nobody knows."""
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


FLUSH_SLICE = 128  # slots of one step: about a millisecond where each is a node of its own
QUEUED_POOLS = 4  # tokens that may wait, in sizes of the KV cache


class Status(NamedTuple):
    """What /ready tells. `state` is loading, ready, draining or stopped; `error` says why it stopped."""

    state: str
    phase: str
    progress: float
    error: str


class Workers(Protocol):
    """The engine's view of the fleet."""

    def send(self, update: Update) -> None:
        """Queue an update for every rank."""

    def applied(self, number: int) -> None:
        """Updates up to `number` were applied: their arena space is free."""


class Settings(NamedTuple):
    """What the server decides before the workers answer; sizes come from `Ready`."""

    rows: int
    chunk_budget: int
    chunk_size: int
    prefix_cache: bool
    policy: Policy
    queue: int
    """Requests that may wait; one more is refused."""
    queue_tokens: int = 0
    """Their tokens; 0 is QUEUED_POOLS times the KV cache."""
    key_share: float = 1.0
    """Share of both that the requests of one API key may take up."""
    service: Service = DEFAULT
    cache: Shares = WHOLE
    """What the parts of the prefix cache may keep, by name of API key."""


class Engine:
    """Submit, abort and read `status` from the event loop only."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.core: Scheduler | None = None
        self.workers: Workers | None = None
        self.ready: Ready | None = None
        self.state = "loading"
        self.phase = "starting"
        self.progress = 0.0
        self.error = ""
        self.signs = 0
        """Of life: iterations that workers told of, and what they say while they wait."""
        self.on_header: Callable[[Header, int], None] = lambda header, tokens: None
        self.on_cost: Callable[[float, float], None] = lambda scheduler, index: None
        """Told of the seconds of thinking for each published iteration, and of those of them spent in the index."""
        self._thought = self._indexed = 0.0
        self._expiry: tuple[float, asyncio.TimerHandle] | None = None
        self._planned = self._ending = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def pulse(self) -> int | None:
        """What grows while workers have work, as watchdogs look at it; None while they have none."""
        return self.signs if self.workers is not None and self.core is not None and not self.core.idle else None

    # The HTTP face's side

    @property
    def status(self) -> Status:
        return Status(self.state, self.phase, self.progress, self.error)

    @property
    def limits(self) -> Limits:
        """Sizes of the running model; EngineBusy while there is none."""
        if self.core is None:
            raise EngineBusy(self.state, self.error or f"the model is loading: {self.phase} {self.progress:.0%}")
        return self.core.limits

    def submit(self, *requests: Request) -> None:
        """Queue requests together; EngineBusy while they cannot be taken, ValueError where one can never run."""
        core = self._open()
        if core.waiting:  # who finds nobody waiting is taken, whatever it asks for
            tokens = sum(request.known for request in requests)
            self._check_queue(core, requests[0].key, len(requests), tokens)
        core.submit(*requests)
        self._idle.clear()
        self._wake()

    def check_room(self, key: str) -> None:
        """Raises EngineBusy where `submit` would, whatever this API key asks for: before it is any work."""
        core = self._open()
        if core.waiting:
            self._check_queue(core, key, 1, 1)

    def _open(self) -> Scheduler:
        """Raises EngineBusy where nothing is taken at all."""
        if self.state in ("draining", "stopped") or self.core is None:
            raise EngineBusy(self.state, self.error or f"the server is {self.state}")
        return self.core

    def _check_queue(self, core: Scheduler, key: str, requests: int, tokens: int) -> None:
        """Raises EngineBusy where so many more may not wait."""
        settings, waiting = self.settings, core.waiting
        most = settings.queue_tokens or QUEUED_POOLS * core.limits.slots // core.limits.window.each
        full = None
        if len(waiting) + requests > settings.queue:
            full = f"{len(waiting)} requests are waiting, --max_queue is {settings.queue}"
        elif waiting.tokens + tokens > most:
            full = f"requests of {waiting.tokens} tokens are waiting, --max_queue_tokens is {most}"
        now = time.monotonic()
        if full is not None:
            excess = max(requests, len(waiting) // 10)  # room for others too: they all come back at that time
            raise EngineBusy("queue_full", full, core.drain.retry_after(now, excess))
        mine, share = waiting.waiting(key), max(1, int(settings.queue * settings.key_share))
        if key and mine and mine + requests > share:
            text = f"{mine} requests of this API key are waiting, and {share} may (--max_queue_share)"
            raise EngineBusy("rate_limit_exceeded", text, core.drain.retry_after(now, max(requests, mine // 10)))

    @property
    def retry_after(self) -> int:
        """Seconds after which somebody who was turned away may find room."""
        core = self.core
        return core.drain.retry_after(time.monotonic(), max(1, len(core.waiting) // 10)) if core is not None else 5

    def abort(self, request: Request) -> None:
        """The client is gone, or wants no more: the row is retired at the next boundary."""
        if self.core is not None:
            self.core.abort(request)
            self._wake()

    async def drain(self, seconds: float) -> None:
        """Refuse what is new, let run what runs, and abort what is left after `seconds`."""
        self._ending = True
        if self.state != "stopped":
            self.state = "draining"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        if self.core is not None:
            for request in [*self.core.waiting, *(row.request for row in self.core.ledger.running.values())]:
                self.core.abort(request, Finish("error", error="the server is shutting down"))
        self._wake()

    def hold(self) -> bool:
        """Refuse what is new until `resume`; what runs or waits goes on. False where the engine is not ready."""
        if self.state == "ready":
            self.state = "draining"
        return self.state == "draining"

    def resume(self) -> bool:
        """Take requests again; False where nobody held them up, or the server is about to end."""
        if self.state != "draining" or self._ending:
            return False
        self.state = "ready" if self.workers is not None else "loading"
        return True

    def share(self, key_share: float, cache: Shares) -> None:
        """What API keys may have of the queue and of the prefix cache from now on."""
        self.settings = self.settings._replace(key_share=key_share, cache=cache)
        if self.core is not None:
            self.core.share(cache)

    async def flush(self) -> int:
        """Empty the prefix cache but for what running requests stand on; the tokens that went. It goes in slices, and
        what requests add meanwhile stays."""
        flushed, left = 0, self.core.ledger.index.evictable if self.core is not None else 0
        while self.core is not None and left > 0:
            index = self.core.ledger.index
            before = index.evicted
            freed = self.core.ledger.evict(min(left, FLUSH_SLICE))
            flushed += index.evicted - before
            if not freed:
                break
            left -= freed
            await asyncio.sleep(0)
        return flushed

    def check_integrity(self) -> None:
        """Raises AssertionError where a slot has no owner, or two."""
        if self.core is not None:
            check(self.core)

    # The fleet's side

    def on_loading(self, loading: Loading) -> None:
        self.phase, self.progress = loading.phase, loading.fraction

    def on_ready(self, ready: Ready, workers: Workers) -> int:
        """A group of workers serves; after a death running requests wait in the same queue. The epoch is returned."""
        self.ready, self.workers = ready, workers
        if self.core is None:
            settings = self.settings
            limits = Limits(
                settings.rows, ready.slots * (1 + ready.windowed), ready.max_length, settings.chunk_budget,
                settings.chunk_size, settings.prefix_cache, Window(ready.window, ready.windowed),
            )  # fmt: skip
            self.core = Scheduler(limits, settings.policy, settings.service, settings.cache)
        if self.state == "loading":
            self.state, self.phase, self.progress = "ready", "ready", 1.0
        self._wake()
        return self.core.epoch

    def on_death(self) -> None:
        """Rule M: the workers are gone; their rows wait for the next group."""
        self.workers = None
        if self.state == "ready":
            self.state, self.phase, self.progress = "loading", "restarting the worker", 0.0
        if self.core is not None:
            self.core.lose_worker()
        self._settle()

    def on_stopped(self, error: str) -> None:
        """No worker will come back: everything ends with the reason."""
        self.state, self.error = "stopped", error
        if self.core is not None:
            for request in [*self.core.waiting, *(row.request for row in self.core.ledger.running.values())]:
                self.core.abort(request, Finish("error", error=error))
        self._settle()

    def on_alive(self) -> None:
        """Workers wait for grammars, and are well."""
        self.signs += 1

    def on_message(self, message: FromWorker) -> None:
        """A result or a failed iteration; once per published iteration."""
        core = self.core
        if core is None or not isinstance(message, Result | Failed):
            return
        self.signs += 1
        self._wake()  # before anything that the sinks of tokens ask for: the device comes first
        self._tell_cost(core)
        tokens, began = 0, time.perf_counter()
        if isinstance(message, Result):
            tokens = core.on_result(message)
        else:
            log.error("an iteration failed: %s", message.error)
            core.on_failed(message)
        self._thought += time.perf_counter() - began
        if self.workers is not None and message.header.epoch == core.epoch:
            self.workers.applied(message.header.applied)
            self.on_header(message.header, tokens)

    def _wake(self) -> None:
        """Plan once before the loop waits again, however many events ask for it."""
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._plan)

    def _plan(self) -> None:
        self._planned = False
        if self.core is not None and self.workers is not None:
            began = time.perf_counter()
            update = self.core.plan(time.monotonic())
            self._thought += time.perf_counter() - began
            if update is not None:
                self.workers.send(update)
                if update.chunk_rows:
                    self._wake()  # the device wants the chunks after these before they are done
        self._settle()

    def _tell_cost(self, core: Scheduler) -> None:
        """What results and plans have cost since the last iteration."""
        self.on_cost(self._thought, core.ledger.index.seconds - self._indexed)
        self._thought, self._indexed = 0.0, core.ledger.index.seconds

    def _watch_queue(self) -> None:
        """Give up what has waited for too long, now and at the time when the next request will have."""
        if self.core is None:
            return
        self.core.expire(time.monotonic())
        due = self.core.waiting.next_expiry
        if self._expiry is not None and self._expiry[0] != due:
            self._expiry[1].cancel()
            self._expiry = None
        if due is not None and self._expiry is None:
            delay = max(0.0, due - time.monotonic()) + 0.001
            self._expiry = due, asyncio.get_running_loop().call_later(delay, self._expired)

    def _expired(self) -> None:
        self._expiry = None
        self._wake()

    def _settle(self) -> None:
        self._watch_queue()
        if self.core is None or self.core.idle:
            self._idle.set()
