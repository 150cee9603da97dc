"""Workers are given up where they stand still, and nowhere else."""

import asyncio
import time
from collections.abc import Iterable, Iterator

from aiollm.fleet.standstill import LOOKS, standstill


async def looks(pulses: Iterable[int | None]) -> int | None:
    """After how many of these it was over; None where it went on after the last."""
    seen = 0

    def pulse() -> int | None:
        nonlocal seen
        seen += 1
        return next(source)

    source: Iterator[int | None] = iter(pulses)
    try:
        await standstill(pulse, 0.0)
    except RuntimeError:  # a coroutine cannot raise StopIteration
        return None
    return seen


def test_the_same_count_at_every_look_is_a_standstill() -> None:
    assert asyncio.run(looks([7] * 100)) == LOOKS + 1


def test_signs_of_life_and_idleness_begin_the_count_anew() -> None:
    almost = [7] * LOOKS
    assert asyncio.run(looks([*almost, 8, *almost[1:], None, *almost, 8])) is None
    assert asyncio.run(looks([None] * 100)) is None
    assert asyncio.run(looks([*almost, None, *[7] * (LOOKS + 1)])) == 2 * LOOKS + 2


def test_the_looks_are_spread_over_the_time() -> None:
    began = time.monotonic()
    asyncio.run(standstill(lambda: 1, 0.2))
    assert time.monotonic() - began >= 0.2
