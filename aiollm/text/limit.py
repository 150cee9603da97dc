"""Work in a thread that is stopped when it takes too long: chat templates are programs that came with a model."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Overdue(BaseException):
    """Raised inside of the work; no Exception, so that the work cannot take it for one of its own."""


async def within(seconds: float, function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in a thread. Raises TimeoutError where it is not done after `seconds`.

    Python code is interrupted between two of its instructions; a single call into C ends first. A cancelled caller's
    work is interrupted as well.
    """
    work = _Work(function, args)
    alarm = asyncio.get_running_loop().call_later(seconds, work.interrupt)
    try:
        return await asyncio.to_thread(work.run)
    except asyncio.CancelledError:
        work.interrupt()
        raise
    finally:
        alarm.cancel()


class _Work(Generic[T]):
    """One call, and the thread that is in it."""

    def __init__(self, function: Callable[..., T], args: tuple[object, ...]) -> None:
        self._function, self._args = function, args
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._overdue = False

    def run(self) -> T:
        own = threading.get_ident()
        try:
            with self._lock:
                if self._overdue:  # it has waited for a thread for too long
                    raise _Overdue
                self._thread = own
            try:
                return self._function(*self._args)
            finally:
                with self._lock:
                    self._thread = None  # from here on nobody interrupts
                _raise_in(own, None)  # and what is on its way must not hit the thread's next work
        except _Overdue:
            raise TimeoutError from None

    def interrupt(self) -> None:
        with self._lock:
            self._overdue = True
            if self._thread is not None:
                _raise_in(self._thread, _Overdue)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have `error` raised in a thread, or None: whatever was to be raised there is not."""
    address = None if error is None else ctypes.c_void_p(id(error))  # CPython's ids are addresses
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), address)
