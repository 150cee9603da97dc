"""Work in a thread that is stopped when it takes too long: chat templates are programs that came with a model."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

AGAIN = 0.1  # seconds between interrupts

T = TypeVar("T")


class _Overdue(BaseException):
    """Raised inside of the work; no Exception, so that the work cannot take it for one of its own."""


async def within(seconds: float, function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in a thread. Raises TimeoutError where it is not done after `seconds`.

    Python code is interrupted between two of its instructions; a single call into C ends first. A cancelled caller's
    work is interrupted as well. Some code swallows an interrupt, such as the callback of a weak reference: more follow.
    """
    work = _Work(function, args)
    alarm = _Alarm(work, seconds)
    try:
        return await asyncio.to_thread(work.run)
    except asyncio.CancelledError:
        alarm.cancel()
        alarm.strike()
        raise
    finally:
        if work.ended:
            alarm.cancel()


class _Work(Generic[T]):
    """One call, and the thread that is in it."""

    def __init__(self, function: Callable[..., T], args: tuple[object, ...]) -> None:
        self._function, self._args = function, args
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._overdue = False
        self.ended = False

    def run(self) -> T:
        try:
            try:
                with self._lock:
                    if self._overdue:  # it has waited for a thread for too long
                        raise _Overdue
                    self._thread = threading.get_ident()
                return self._function(*self._args)
            finally:
                self._leave()
        except _Overdue:
            self._leave()  # once more: it may have come while the thread left
            raise TimeoutError from None

    def _leave(self) -> None:
        with self._lock:
            self._thread, self.ended = None, True  # from here on nobody interrupts
        _raise_in(threading.get_ident(), None)  # and what is on its way must not hit the thread's next work

    def interrupt(self) -> bool:
        """Whether it may take another one."""
        with self._lock:
            self._overdue = True
            if self._thread is not None:
                _raise_in(self._thread, _Overdue)
            return not self.ended


class _Alarm:
    """Interrupts work after so many seconds, and again until it has ended. A closure that names itself would be left to
    the garbage collector."""

    def __init__(self, work: _Work[T], seconds: float) -> None:
        self._loop, self._interrupt = asyncio.get_running_loop(), work.interrupt
        self._timer = self._loop.call_later(seconds, self.strike)

    def strike(self) -> None:
        if self._interrupt():
            self._timer = self._loop.call_later(AGAIN, self.strike)

    def cancel(self) -> None:
        self._timer.cancel()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have `error` raised in a thread, or None: whatever was to be raised there is not."""
    address = None if error is None else ctypes.c_void_p(id(error))  # CPython's ids are addresses
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), address)
