"""SIGHUP: somebody wants the settings read again, or the terminal was closed."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any


def on_hangup(again: Callable[[], Coroutine[Any, Any, None]], closed: Callable[[], None]) -> None:
    """From now on SIGHUP runs `again`, once at a time; where it tells of the end of the terminal, `closed`.

    That is so where there was one, and nohup did not have it ignored: such a server would go on unseen.
    """
    ends_with_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    lock = asyncio.Lock()
    running: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def locked() -> None:
        async with lock:
            await again()

    def hung_up() -> None:
        if ends_with_terminal and not _has_terminal():
            closed()
            return
        task = loop.create_task(locked())
        running.add(task)
        task.add_done_callback(running.discard)

    loop.add_signal_handler(signal.SIGHUP, hung_up)


def _has_terminal() -> bool:
    """Whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
