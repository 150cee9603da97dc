"""Work that takes too long is stopped, and does no harm to the thread that it ran in."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiollm.text.limit import within


def spin(alive: threading.Event) -> None:
    alive.set()
    while True:
        pass


def run(coroutine: object) -> object:
    """On a loop whose threads are one, so that the next work meets the thread of the last."""

    async def main() -> object:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        return await coroutine  # type: ignore[misc]

    return asyncio.run(main())


def test_gives_what_the_work_gives_and_raises_what_it_raises() -> None:
    assert run(within(60, divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        run(within(60, divmod, 7, 0))


def test_work_without_an_end_is_stopped_and_its_thread_is_free_again() -> None:
    async def main() -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await within(0.01, spin, threading.Event())
            assert await within(60, divmod, 7, 2) == (3, 1)

    run(main())


def test_work_cannot_hold_on_to_its_life() -> None:
    def clings() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:  # noqa: BLE001
                pass

    with pytest.raises(TimeoutError):
        run(within(0.01, clings))


def test_an_interrupt_that_is_swallowed_is_followed_by_others() -> None:
    def deaf() -> None:
        for _ in range(2):
            with contextlib.suppress(BaseException):
                spin(threading.Event())
        spin(threading.Event())

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await within(0.01, deaf)
        assert await within(60, divmod, 7, 2) == (3, 1)

    run(main())


def test_work_that_has_no_thread_in_time_never_begins() -> None:
    async def main() -> None:
        held, begun = threading.Event(), threading.Event()
        first = asyncio.ensure_future(asyncio.to_thread(held.wait))
        second = asyncio.ensure_future(within(0, begun.set))
        for _ in range(4):  # it is put in the queue, its time is up
            await asyncio.sleep(0)
        held.set()
        await first
        with pytest.raises(TimeoutError):
            await second
        assert not begun.is_set()

    run(main())


def test_a_cancelled_caller_stops_the_work() -> None:
    async def main() -> None:
        alive = threading.Event()
        task = asyncio.create_task(within(60, spin, alive))
        while not alive.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await within(60, divmod, 7, 2) == (3, 1)  # its only thread is free

    run(main())


def test_interrupts_that_come_at_the_very_end_hit_nobody() -> None:
    async def main() -> None:
        for turn in range(2000):
            with contextlib.suppress(TimeoutError):
                assert await within(turn % 7 * 1e-5, divmod, 7, 2) == (3, 1)
        assert await within(60, sum, range(100_000)) == 4999950000

    run(main())
