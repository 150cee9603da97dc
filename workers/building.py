"""Threads in which grammars are built beside the loop, and what is done about those that do not come back.

A grammar compiled within seconds when the server tried it out. Should it not do so here, nothing can end it: those who
wait for it are told, its thread is lost for as long as it takes, and once there is no thread left, the worker has to be
replaced.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

THREADS = 8  # grammars that are built side by side: one that takes long leaves the others their share
LATE = 120.0  # seconds; it took 5 of computing at most when it was tried out, and may have an eighth of a core here
TELLING = 2.0  # seconds, for a step in which rows fail
STACK = 64 << 20  # bytes of a thread; a grammar was tried out with 8 MB
NICE = 5  # the loop and its masks go first


class Stuck(RuntimeError):
    """No thread is left that could build a grammar."""


class Builders(Executor):
    """A thread for each job, at most `most` at once. They keep no process from its end."""

    def __init__(self, most: int = THREADS) -> None:
        self.most = most
        self._running = 0
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            self._queue.append((future, partial(function, *args, **kwargs)))
            self._begin()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """What has begun goes on."""
        with self._lock:
            while cancel_futures and self._queue:
                self._queue.popleft()[0].cancel()

    def _begin(self) -> None:
        """With the lock."""
        while self._queue and self._running < self.most:
            future, work = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                thread = threading.Thread(target=self._run, args=(future, work), name="grammar", daemon=True)
                usual = threading.stack_size(STACK)
                try:
                    thread.start()
                finally:
                    threading.stack_size(usual)
                self._running += 1

    def _run(self, future: "Future[Any]", work: Callable[[], Any]) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            outcome = partial(future.set_result, work())
        except BaseException as error:  # noqa: BLE001  the future's own; a panic in Rust is no Exception
            outcome = partial(future.set_exception, error)
        with self._lock:
            self._running -= 1
            self._begin()
        outcome()


class Watch:
    """Over what `threads` threads do."""

    def __init__(self, threads: int = THREADS, late: float = LATE) -> None:
        self.late = late
        self._threads = threads
        self._begun: dict[Future[Any], float | None] = {}
        """Since when each is known to run, of what is not done."""

    def add(self, work: "Future[Any]") -> None:
        if not work.done():
            self._begun.setdefault(work)

    def overdue(self, now: float) -> "set[Future[Any]]":
        """What has run for too long and still does."""
        for work, begun in list(self._begun.items()):
            if work.done():
                del self._begun[work]
            elif begun is None and work.running():
                self._begun[work] = now
        return {work for work, begun in self._begun.items() if begun is not None and now - begun > self.late}

    def check(self, now: float) -> None:
        """Raises Stuck where no thread is left, and all who wait for what they do have been told."""
        if len(self.overdue(now - TELLING)) >= self._threads:
            raise Stuck(f"all {self._threads} threads that build grammars are stuck")
