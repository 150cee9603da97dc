"""A stream's one timer: it asks for a sign of life after silence, and cuts off a client that does not read."""

import asyncio
from collections.abc import Callable


class Pulse:
    """`beat` is set when a comment is due. A timer for each write would cost 3 us; this one runs by itself."""

    __slots__ = (
        "beat", "_loop", "_writing", "_since", "_timer", "_keep_alive", "_write_timeout", "_wake", "_cut",
    )  # fmt: skip

    def __init__(
        self, keep_alive: float, write_timeout: float, wake: Callable[[], None], cut: Callable[[], None]
    ) -> None:
        """After `keep_alive` seconds without a write `wake` is called, after `write_timeout` within one `cut` is."""
        self.beat = False
        self._loop = asyncio.get_running_loop()
        self._keep_alive, self._write_timeout = keep_alive, write_timeout
        self._wake, self._cut = wake, cut
        self._writing = False
        self._since = self._loop.time()
        self._timer = self._loop.call_later(min(keep_alive, write_timeout), self._look)

    def begin(self) -> None:
        """A write begins, or still waits for the client to read."""
        if not self._writing:
            self._writing, self._since = True, self._loop.time()

    def done(self, now: float | None = None) -> None:
        """The write is through, and whatever was due with it; `now` is the loop's time where it is known."""
        self._writing, self._since = False, self._loop.time() if now is None else now
        self.beat = False

    def stop(self) -> None:
        """For good: it lets go of what it would have called."""
        self._timer.cancel()
        self._wake = self._cut = _nothing

    def _look(self) -> None:
        now = self._loop.time()
        if self._writing and now - self._since >= self._write_timeout:
            self._cut()
            return
        if not self._writing and now - self._since >= self._keep_alive:
            self.beat = True
            self._since = now
            self._wake()
        rest = self._since + (self._write_timeout if self._writing else self._keep_alive) - now
        self._timer = self._loop.call_later(min(rest, self._keep_alive, self._write_timeout), self._look)


def _nothing() -> None:
    """Nobody is to be waked."""
