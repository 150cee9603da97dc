"""Streams that are written from outside of their handlers: slow clients, old clients, several at once."""

import asyncio
import json

import pytest
from stand import Runner, Stand

from aiollm.api.stream import OUTBOX, Stream
from aiollm.engine.engine import Engine

PATH = "/v1/completions"


def request(body: dict[str, object], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/%s\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        PATH.encode(), version.encode(), len(data), data,
    )  # fmt: skip


def texts(events: bytes) -> str:
    found = [json.loads(line[6:]) for line in events.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in found for choice in event["choices"])


def running(served: Stand) -> int:
    assert served.engine.core is not None
    return len(served.engine.core.ledger.running)


def test_what_comes_while_a_client_does_not_read_shares_an_event_once_it_does(
    served: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Stream] = []
    start = Stream.start
    monkeypatch.setattr(Stream, "start", lambda self: [seen.append(self), start(self)][1])

    async def main(stand: Stand) -> bytes:
        stand.workers.say("abcdefgh")
        stand.workers.held = True
        events = asyncio.create_task(stand.events(PATH, {"prompt": "p", "seed": 0}))
        await stand.until(lambda: bool(seen) and running(stand) == 1)
        connection = seen[0]._connection

        async def steps(count: int) -> None:
            for _ in range(count):
                stand.workers.step()
                await asyncio.sleep(0)

        await steps(2)
        connection.pause_writing()  # as the transport does when its buffer is full
        await steps(3)
        connection.resume_writing()
        await asyncio.sleep(0)
        await steps(1)
        connection.pause_writing()
        stand.workers.release()
        await stand.until(lambda: running(stand) == 0)
        assert not events.done(), "the end is held back too"
        connection.resume_writing()
        return await events

    found = served.run(main(served.stand)).split(b"\n\n")
    assert [texts(event) for event in found[:4]] == ["a", "b", "cde", "f"] and texts(found[4]) == "gh"
    assert found[-2] == b"data: [DONE]"


def test_an_old_client_gets_its_stream_without_chunks(served: Runner) -> None:
    async def main() -> bytes:
        served.stand.workers.say("abc")
        return await served.stand.raw(request({"prompt": "p", "stream": True}, version="1.0"))

    head, _, body = served.run(main()).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"\n\ndata: [DONE]\n\n") and texts(body) == "abc"


def test_the_device_comes_first_then_texts_are_made_and_then_written(
    served: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    outbox = served.stand.app[OUTBOX]
    take, write, flush = Stream.take, Stream.write, outbox._act
    plan = Engine._plan
    monkeypatch.setattr(Engine, "_plan", lambda self: [seen.append("plan"), plan(self)][1])
    monkeypatch.setattr(Stream, "take", lambda self: [seen.append("take"), take(self)][1])
    monkeypatch.setattr(Stream, "write", lambda self, data, now: [seen.append("write"), write(self, data, now)][1])
    monkeypatch.setattr(outbox, "_act", lambda due: [seen.append("flush"), flush(due)][1])

    async def main(stand: Stand) -> None:
        stand.workers.say("abcd")
        stand.workers.held = True
        core = stand.engine.core
        assert core is not None
        both = [asyncio.create_task(stand.events(PATH, {"prompt": "p", "seed": 0})) for _ in range(2)]
        await stand.until(lambda: len(core.ledger.running) == 2)
        for _ in range(4):
            stand.workers.step()
            await asyncio.sleep(0)
        stand.workers.release()
        assert [texts(events) for events in await asyncio.gather(*both)] == ["abcd", "abcd"]

    served.run(main(served.stand))
    assert " ".join(seen).count("plan flush take take write write") >= 3
