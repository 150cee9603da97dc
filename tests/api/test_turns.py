import asyncio

from aiollm.api.turns import FEW, SLICE, Starts, Turns, wake


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


def test_who_wants_to_begin_waits_for_a_turn_and_nobody_is_overtaken() -> None:
    async def main() -> None:
        loop, starts = asyncio.get_running_loop(), Starts()
        begun: list[int] = []
        seen: list[int] = []

        async def begin(number: int) -> None:
            await starts.turn()
            begun.append(number)

        def look() -> None:
            seen.append(len(begun))
            if seen[-1] < len(tasks):
                loop.call_soon(look)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(begin(number)) for number in range(3 * FEW + 1)]
            loop.call_soon(look)
        assert begun == list(range(len(tasks)))
        assert sorted(set(seen)) == [0, FEW, 2 * FEW, 3 * FEW, len(tasks)]

    asyncio.run(main())


def test_who_gives_up_waiting_holds_up_nobody() -> None:
    async def main() -> None:
        starts = Starts()
        first, second = (asyncio.create_task(starts.turn()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(10):
            await second
        assert first.cancelled()

    asyncio.run(main())
