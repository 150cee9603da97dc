"""Where launched work runs: in order, behind whatever was launched before it.

On a CPU a stream is one thread with a queue, so that the loop overlaps there exactly as it does with a GPU.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class StateLost(Exception):
    """The device's tables may lack what an update brought, or the device itself is lost: no later step can be trusted,
    the worker must go."""


class Pending:
    """A launched piece of work: wait for it, then read `result` or `error`. Times are seconds of the stream's clock, 0
    where the work never ran."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.result: object = None
        self.error: BaseException | None = None
        self.began = 0.0
        self.ended = 0.0

    @property
    def worked(self) -> float:
        """Seconds from begin to end in which the stream had something of it to do."""
        return self.ended - self.began

    def wait(self) -> None:
        self._done.wait()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def run(self, work: Callable[[], object]) -> None:
        """Do the work here and now; whatever it raises is the launch's error."""
        self.began = time.monotonic()
        try:
            self.result = work()
        except BaseException as error:  # noqa: BLE001  the launch's own, read at its post
            self.error = error
        self.ended = time.monotonic()
        self._done.set()


def failed(error: BaseException) -> Pending:
    """A launch that never was: done, with its error, at no time."""
    pending = Pending()
    pending.error = error
    pending._done.set()
    return pending


class Split(Pending):
    """Work in two launches: `first` is under way, the second one follows when its input is there (rule J)."""

    def __init__(self, first: Pending) -> None:
        super().__init__()
        self.first = first
        self._second: Pending | None = None
        self._followed = threading.Event()

    @property
    def worked(self) -> float:
        second = self._second
        return self.first.worked + (second.worked if second is not None else 0.0)

    def follow(self, second: Pending) -> None:
        """The second launch; its work begins with `outcome`."""
        self._second = second
        self._followed.set()

    def abandon(self, error: BaseException) -> None:
        """Nobody will launch the rest: who waits for it gets the error."""
        if self._second is None:
            self.follow(failed(error))

    def outcome(self) -> object:
        """What the first launch left; raises what it raised. On the stream only, behind it."""
        if self.first.error is not None:
            raise self.first.error
        return self.first.result

    def wait(self) -> None:
        self._followed.wait()
        second = self._second
        assert second is not None
        self.first.wait()
        second.wait()
        self.result, self.error = second.result, second.error
        self.began, self.ended = self.first.began, second.ended or self.first.ended
        self.first.result = None  # hidden states, of which nobody needs to know any more
        self._done.set()

    @property
    def done(self) -> bool:
        if not self._done.is_set() and self._second is not None and self.first.done and self._second.done:
            self.wait()
        return self._done.is_set()


class Stream(Protocol):
    def launch(self, work: Callable[[], object]) -> Pending:
        """Queue work behind all earlier work; returns at once."""

    def context(self) -> AbstractContextManager[object]:
        """What a thread must enter before it launches; thread-local, so each thread enters it."""

    def close(self) -> None:
        """Run what is queued, then end."""


class HostStream:
    """A CPU's stream: one thread, first in, first out. `enter` is the mode that thread works in."""

    def __init__(self, enter: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._work: queue.SimpleQueue[tuple[Pending, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(enter,), name="stream", daemon=True)
        self._thread.start()

    def _serve(self, enter: Callable[[], AbstractContextManager[object]]) -> None:
        with enter():
            while (item := self._work.get()) is not None:
                pending, work = item
                pending.run(work)
                del item, work

    def launch(self, work: Callable[[], object]) -> Pending:
        pending = Pending()
        self._work.put((pending, work))
        return pending

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
