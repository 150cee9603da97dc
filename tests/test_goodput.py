"""Goodput as the tool counts it, and a server that refuses what its clients ask."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import goodput
import numpy as np
import pytest
from goodput import Answer
from simulator import Ask

SETTINGS = {"warm_up": 10.0, "window": 20.0}


def test_good_are_prompt_and_steady_answers_that_end_in_the_window() -> None:
    good = Answer(asked=5.0, first=8.0, last=12.0, gap=1.0, tokens=100, done=True)
    others = [
        good._replace(first=15.5, last=16.0),  # began late
        good._replace(gap=1.6),  # stood still
        good._replace(last=9.9),  # ended before the window
        good._replace(last=30.1),
        good._replace(done=False),
        good._replace(first=-1.0, last=-1.0, tokens=0, done=False),  # never began
    ]
    found = goodput.figures([good, *others], SETTINGS)
    assert found["goodput"] == 100 / 20 and found["good"] == 1
    assert found["tokens_per_second"] == 400 / 20 and found["answers"] == 4
    assert found["lost"] == 1


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that says the same to everybody; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_refusal_ends_the_run_with_what_the_server_said() -> None:
    settings = SETTINGS | {"workload": "reasoning", "seed": 0, "cap": 100, "scale": 1, "clients": 3, "vocabulary": 99}

    async def run() -> None:
        async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\nno such token") as url:
            await goodput.clients(url, settings)

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(asyncio.wait_for(run(), 10))
    assert failed.group_contains(RuntimeError, match=r"(?s)400 Bad Request.*no such token")


def test_tokens_and_the_longest_gap_are_those_that_came() -> None:
    events = [
        b'data: {"choices": [{"token_ids": [5, 6], "finish_reason": null}]}\n\n',
        b'data: {"choices": [{"token_ids": [], "finish_reason": null}]}\n\n',
        b'data: {"choices": [{"token_ids": [7], "finish_reason": "stop"}]}\n\n',
        b"data: [DONE]\n\n",
    ]

    async def run(output: int) -> Answer:
        async with answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(events)) as url:
            host, port = url.removeprefix("http://").split(":")
            return await goodput.ask_one(host, int(port), Ask(np.arange(3), output, 9), 99, 0.0)

    answer = asyncio.run(run(3))
    assert answer.tokens == 3 and answer.done
    assert 0 < answer.asked <= answer.first <= answer.last and answer.gap == answer.last - answer.first
    with pytest.raises(RuntimeError, match="3 tokens, not 4"):
        asyncio.run(run(4))
