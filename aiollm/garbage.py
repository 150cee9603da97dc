"""When Python looks for garbage: while nobody is served, for the event loop stands still meanwhile.

Requests need no collector: what holds each other in one is parted at its end. It finds what some errors leave.
"""

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

EVERY = 1.0  # seconds between two looks
SOME = 10_000  # objects more than after the last collection, from which on it is worth its time
LITTLE = 16 << 20  # bytes more than then, from which on it is too: few objects may hold much
GROWTH = 256 << 20  # bytes more; so much is not left to garbage, though somebody is served
PAGE = os.sysconf("SC_PAGE_SIZE")


def settle() -> None:
    """What is here stays, and is not looked at any more; from now on Python collects nothing by itself.

    With 2,500 requests running, full collections took 200 to 440 ms of a slow core that others used too, every few
    seconds.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


async def collect_at_rest(idle: Callable[[], bool]) -> None:
    """For ever."""
    least = resident()
    while True:
        await asyncio.sleep(EVERY)
        grown = resident() - least
        if grown > GROWTH or (idle() and (grown > LITTLE or gc.get_count()[0] > SOME)):
            gc.collect()
            least = resident()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
