import asyncio

from aiollm.api.turns import SLICE, Turns, wake


def test_many_are_woken_in_turn_and_the_loop_looks_around_in_between() -> None:
    async def main() -> None:
        loop, wakes = asyncio.get_running_loop(), Turns(wake)
        events = [asyncio.Event() for _ in range(3 * SLICE + 1)]
        seen: list[int] = []

        def look() -> None:
            seen.append(sum(event.is_set() for event in events))
            if seen[-1] < len(events):
                loop.call_soon(look)

        for event in events:
            wakes.add(event)
        loop.call_soon(look)
        async with asyncio.timeout(10):
            for event in events:
                await event.wait()
            while seen[-1] < len(events):
                await asyncio.sleep(0)
        assert seen == [SLICE, 2 * SLICE, 3 * SLICE, len(events)]

    asyncio.run(main())


def test_who_is_added_meanwhile_is_woken_too() -> None:
    async def main() -> None:
        wakes, first, second = Turns(wake), asyncio.Event(), asyncio.Event()
        wakes.add(first)
        await first.wait()
        wakes.add(second)
        wakes.add(first)
        async with asyncio.timeout(10):
            await second.wait()

    asyncio.run(main())
