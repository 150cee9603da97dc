"""Requests leave nothing to the garbage collector, which waits until nobody is served."""

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from stand import Stand, stand
from tiny_tokenizer import write_byte_tokenizer

from aiollm import garbage

CHAT, TEXT, SOCKET = "/v1/chat/completions", "/v1/completions", "/v1/chat/ws"
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without a collection but those that are asked for."""
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.unfreeze()
    gc.enable()


async def whole(served: Stand) -> None:
    assert (await served.post(CHAT, QUESTION | {"n": 2}))[0] == 200


async def scored(served: Stand) -> None:
    assert (await served.post(TEXT, {"prompt": "hi", "logprobs": 1, "temperature": 0, "n": 2}))[0] == 200


async def streamed(served: Stand) -> None:
    assert (await served.events(CHAT, QUESTION)).endswith(b"data: [DONE]\n\n")


async def refused(served: Stand) -> None:
    assert (await served.post(CHAT, {"messages": 5}))[0] == 400


async def turned_away(served: Stand) -> None:
    served.engine.hold()
    assert (await served.post(CHAT, QUESTION))[0] == 503
    served.engine.resume()


async def left(served: Stand) -> None:
    """By its client, in the midst of a stream."""
    served.workers.held = True
    async with served.session.post(served.url + CHAT, json=QUESTION | {"stream": True, "n": 2}) as response:
        assert response.status == 200
        response.close()
    core = served.engine.core
    assert core is not None
    await served.until(lambda: core.idle)
    served.workers.release()


async def socket(served: Stand) -> None:
    async with served.session.ws_connect(served.url + SOCKET) as link:
        for id in "ab":
            await link.send_json({"type": "chat", "id": id, **QUESTION})
            while (await link.receive_json())["type"] != "done":
                pass


@pytest.mark.parametrize("ask", [whole, scored, streamed, refused, turned_away, left, socket])
def test_a_request_leaves_nothing_to_the_collector(
    tmp_path: Path, uncollected: None, ask: Callable[[Stand], Coroutine[Any, Any, None]]
) -> None:
    folder = write_byte_tokenizer(tmp_path)

    async def main() -> None:
        async with stand(folder) as served:
            kept, tasks = served.session, len(asyncio.all_tasks())
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as served.session:
                gc.freeze()  # the rest of this process would take seconds to look through
                for _ in range(2):  # what the first one leaves is there for good, or forgotten here
                    gc.collect()
                    await ask(served)
                    await served.until(lambda: len(asyncio.all_tasks()) == tasks)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            own = (found for found in gc.garbage if type(found).__module__.startswith(("aiollm.", "aiohttp.web")))
            assert Counter(type(found).__qualname__ for found in own) == {}
            served.session = kept

    asyncio.run(main())


class Ring:
    """Garbage, once nobody knows it."""

    def __init__(self) -> None:
        self.itself = self


async def looks(idle: Callable[[], bool], over: Callable[[], bool]) -> None:
    """Let it look after the garbage until it is over."""
    task = asyncio.create_task(garbage.collect_at_rest(idle))
    async with asyncio.timeout(10):
        while not over():
            await asyncio.sleep(0)
    task.cancel()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, uncollected: None) -> None:
    """It looks at every turn of the loop, and a few objects are worth it."""
    monkeypatch.setattr(garbage, "EVERY", 0)
    monkeypatch.setattr(garbage, "SOME", 100)


def test_what_is_there_at_the_start_stays_and_nothing_is_collected_by_itself(uncollected: None) -> None:
    gc.enable()
    garbage.settle()
    assert gc.get_freeze_count() > 10_000 and not gc.isenabled()


def test_garbage_waits_until_nobody_is_served(quick: None) -> None:
    asked = 0

    def idle() -> bool:
        nonlocal asked
        asked += 1
        return asked > 20 and there() is not None  # it was there until now

    async def main() -> None:
        await looks(idle, lambda: there() is None)

    there = weakref.ref(Ring())
    kept = [[] for _ in range(1000)]
    asyncio.run(main())
    assert asked == 21 and kept


def test_there_is_no_collection_where_little_was_made(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "SOME", 10**9)
    there = weakref.ref(Ring())
    turns = 0

    def over() -> bool:
        nonlocal turns
        turns += 1
        return turns > 20

    asyncio.run(looks(lambda: True, over))
    assert there() is not None


def test_a_little_garbage_that_holds_much_goes_while_nobody_is_served(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "SOME", 10**9)
    monkeypatch.setattr(garbage, "resident", lambda: next(sizes, 0))
    for idle in (False, True):
        sizes, turns = iter([0, *[garbage.LITTLE + 1] * 5]), iter(range(20))
        there = weakref.ref(Ring())
        asyncio.run(looks(lambda idle=idle: idle, lambda turns=turns: next(turns, None) is None))  # type: ignore[misc]
        assert (there() is None) == idle


def test_garbage_that_fills_the_memory_does_not_wait(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([0, garbage.GROWTH, garbage.GROWTH + 1])
    monkeypatch.setattr(garbage, "resident", lambda: next(sizes, 0))
    there = weakref.ref(Ring())
    asyncio.run(looks(lambda: False, lambda: there() is None))
    assert next(sizes, None) is None


def test_the_size_of_a_process_is_told_in_bytes() -> None:
    before = garbage.resident()
    block = bytearray(64 << 20)
    assert 48 << 20 < garbage.resident() - before < 128 << 20
    del block
