"""When a group of workers stands still: it has work, and no sign of life comes."""

import asyncio
from collections.abc import Callable

LOOKS = 8


async def standstill(pulse: Callable[[], int | None], seconds: float) -> None:
    """Returns once workers stood still for `seconds`, give or take an eighth.

    `pulse` counts signs of life, or is None while there is nothing to do. The looks are counted, not the time: a server
    that was stopped itself, by Ctrl-Z or with its machine, looks once when it goes on, and its workers go on then too.
    """
    before, same = pulse(), 0
    while same < LOOKS:
        await asyncio.sleep(seconds / LOOKS)
        now = pulse()
        same = same + 1 if now is not None and now == before else 0
        before = now
