import asyncio

from aiollm.api.pulse import Pulse


def test_silence_wakes_and_writes_put_it_off() -> None:
    async def main() -> None:
        woken = asyncio.Event()
        pulse = Pulse(0.02, 60, woken.set, lambda: None)
        for _ in range(3):
            await woken.wait()
            assert pulse.beat
            woken.clear()
            pulse.begin()
            pulse.done()
            assert not pulse.beat
        pulse.stop()

    asyncio.run(main())


def test_a_write_that_hangs_is_cut_off_once_and_no_comment_is_due_in_it() -> None:
    async def main() -> None:
        cut = asyncio.Event()
        pulse = Pulse(0.01, 0.05, lambda: None, cut.set)
        pulse.begin()
        began = asyncio.get_running_loop().time()
        await cut.wait()
        assert asyncio.get_running_loop().time() - began >= 0.05
        assert not pulse.beat
        pulse.stop()

    asyncio.run(main())
