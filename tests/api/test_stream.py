"""Streams that are written from outside of their handlers: slow clients, old clients, several at once."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from stand import Runner, Stand, stand

from aiollm.api.stream import Outbox, Stream

PATH = "/v1/completions"


def request(body: dict[str, object], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/%s\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
        PATH.encode(), version.encode(), len(data), data,
    )  # fmt: skip


def texts(events: bytes) -> str:
    found = [json.loads(line[6:]) for line in events.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in found for choice in event["choices"])


def test_a_client_that_pauses_gets_everything_once_it_reads(folder: Path) -> None:
    async def main() -> tuple[bytes, int]:
        async with stand(folder) as served:
            served.workers.say("x" * 400)
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
            # Alternatives make the stream long enough to fill the buffers of the system on its way.
            body = {"prompt": ["p"] * 300, "max_tokens": 400, "stream": True, "logprobs": 20}
            writer.write(request(body).replace(b"Host: x", b"Host: x\r\nConnection: close"))
            core = served.engine.core
            assert core is not None
            await served.until(lambda: not core.idle)
            await served.until(lambda: core.idle)  # all is generated, and most of it was not taken
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer, len(answer)

    answer, size = asyncio.run(main())
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", answer.partition(b"\r\n\r\n")[2])
    assert size > 1 << 20 and texts(body).count("x") == 300 * 400


def test_an_old_client_gets_its_stream_without_chunks(served: Runner) -> None:
    async def main() -> bytes:
        served.stand.workers.say("abc")
        return await served.stand.raw(request({"prompt": "p", "stream": True}, version="1.0"))

    head, _, body = served.run(main()).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: {") and body.endswith(b"\n\ndata: [DONE]\n\n") and texts(body) == "abc"


def test_streams_are_all_read_before_the_first_is_written(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    take, write, flush = Stream.take, Stream.write, Outbox._flush
    monkeypatch.setattr(Stream, "take", lambda self: [seen.append("take"), take(self)][1])
    monkeypatch.setattr(Stream, "write", lambda self, data, now: [seen.append("write"), write(self, data, now)][1])
    monkeypatch.setattr(Outbox, "_flush", lambda self: [seen.append("flush"), flush(self)][1])

    async def main(stand: Stand) -> None:
        stand.workers.say("abcd")
        stand.workers.held = True
        core = stand.engine.core
        assert core is not None
        both = [asyncio.create_task(stand.events(PATH, {"prompt": "p", "seed": 0})) for _ in range(2)]
        await stand.until(lambda: len(core.running) == 2)
        for _ in range(4):
            stand.workers.step()
            await asyncio.sleep(0.002)
        stand.workers.release()
        assert [texts(events) for events in await asyncio.gather(*both)] == ["abcd", "abcd"]

    served.run(main(served.stand))
    assert "take take write write" in " ".join(seen)
