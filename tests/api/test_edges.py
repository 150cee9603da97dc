"""The edges of HTTP over raw sockets: a client that is slow, huge, broken or many is answered once and let go."""

import asyncio
import contextlib
import json
import logging
import time
import zlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from stand import CONTEXT, WAIT, Runner, Stand, stand

from aiollm.api.app import make_app, serve
from aiollm.api.parts import Settings

TEXT = "/v1/completions"
LIMIT = 16 * CONTEXT + 4 * 1024 * 1024
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n%s\r\n"
CLOSING = HEALTH % b"Connection: close\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
QUICK = 0.5  # seconds for /health: far from every timeout, and kind to a busy machine
KEEP_ALIVE = 0.3
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"

BROKEN = {
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "one length twice": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length with a plus": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "an unknown transfer encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks that are not the last encoding":
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a folded header": HEAD + b"X-A: b\r\n folded: c\r\nContent-Length: 0\r\n\r\n",
    "bare line feeds": b"POST /v1/completions HTTP/1.1\nHost: x\nContent-Length: 0\n\n",
    "one bare line feed": b"POST /v1/completions HTTP/1.1\r\nHost: x\nX-A: b\r\nContent-Length: 0\r\n\r\n",
    "a bare carriage return": HEAD + b"X-A: a\rb\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": HEAD + b"Content-Length : 0\r\n\r\n",
    "a NUL in the path": b"POST /v1/completions\x00 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "a NUL in a header": HEAD + b"X-A: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "no host": b"POST /v1/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "many headers": HEAD + b"" + b"".join(b"X-%d: a\r\n" % i for i in range(10_000)) + b"\r\n",
    "a long path": b"POST /v1/completions" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long request id": HEAD + b"X-Request-Id: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}  # fmt: skip


class Socket:
    """A client that decides about every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def rest(self) -> bytes:
        """Everything until the server closes; what a reset swallows is lost."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := await self.reader.read(65536):
                data += part
        return data

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Socket]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Socket(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def healthy(port: int) -> None:
    """Another client is served, soon. Where one look was late two more must not be: the hostile clients of a test run
    in its own process, and take their time from what is measured."""

    async def seconds() -> float:
        began = time.monotonic()
        async with connected(port) as client:
            client.writer.write(CLOSING)
            assert (await client.rest()).startswith(b"HTTP/1.1 200 OK")
        return time.monotonic() - began

    if await seconds() >= QUICK:
        assert max(await seconds(), await seconds()) < QUICK


def check(served: Runner, work: Coroutine[Any, Any, Any]) -> None:
    """Run it; afterwards /health answers soon, nothing runs, no token was drawn, and every slot is accounted for."""

    async def main() -> None:
        await work
        await healthy(served.stand.port)
        assert served.stand.workers.launched == 0

    served.run(main())


@contextlib.asynccontextmanager
async def hasty(folder: Path, **options: Any) -> AsyncIterator[tuple[Stand, int]]:
    """A stand, and the port of a second listener over its engine that keeps connections for KEEP_ALIVE only."""
    async with asyncio.timeout(WAIT), stand(folder) as served:
        parts = served.parts
        app = make_app(served.engine, parts.tokenizer, parts.template, parts.model, {}, Settings(**options))
        runner = await serve(app, "127.0.0.1", 0, keep_alive=KEEP_ALIVE)
        try:
            yield served, runner.addresses[0][1]
        finally:
            await runner.cleanup()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_refused_and_nothing_that_follows_is_read(
    served: Runner, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = BROKEN[name]

    async def main() -> None:
        async with connected(served.stand.port) as client:
            client.writer.write(data + SMUGGLED)
            answer = await client.rest()
        assert len(data) > 200_000 or answer  # a reset may overtake the answer to what is much too large
        assert b"HTTP/1.1 200" not in answer and len(answer) < 1000
        if answer:
            head, text = answer.split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.") and b"Content-Type: application/json" in head
            error = json.loads(text)["error"]
            status, code = (431, "headers_too_large") if name.startswith("a long") else (400, "invalid_http")
            assert (int(head[9:12]), error["code"], error["type"]) == (status, code, "invalid_request_error")

    with caplog.at_level(logging.INFO):
        check(served, main())
    assert caplog.text == ""  # however many come: they are counted in http_responses


def test_broken_http_is_counted_and_leaves_a_short_line_for_who_looks_for_it(
    served: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> float:
        name = "aiollm_http_responses_total"
        return served.stand.parts.metrics.registry.get_sample_value(name, {"status": "431"}) or 0

    async def main() -> None:
        async with connected(served.stand.port) as client:
            client.writer.write(HEAD + b"X-A: " + b"a" * 9000 + b"\r\n\r\n")
            await client.rest()

    before = refused()
    with caplog.at_level(logging.DEBUG, logger="aiollm"):
        check(served, main())
    (line,) = caplog.messages
    assert line == "127.0.0.1 sent broken HTTP: a header, or the address, is longer than 8190 bytes"
    assert refused() == before + 1


def test_a_request_id_that_is_too_long_is_neither_sent_back_nor_logged(
    served: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with connected(served.stand.port) as client:
            client.writer.write(SMUGGLED[:-2] + b"Connection: close\r\nX-Request-Id: " + b"a" * 8000 + b"\r\n\r\n")
            answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200 OK") and len(answer) < 500

    check(served, main())
    assert "aaaa" not in caplog.text


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: b\r\n"])
@pytest.mark.parametrize("first", [True, False], ids=["first request", "second request"])
def test_headers_that_do_not_arrive_cost_the_connection(folder: Path, sent: bytes, first: bool) -> None:
    async def main() -> None:
        async with hasty(folder) as (_, port), connected(port) as client:
            if not first:
                client.writer.write(HEALTH % b"")
                assert (await client.head()).startswith(b"HTTP/1.1 200 OK")
            client.writer.write(sent)
            began = time.monotonic()
            await client.rest()
            assert KEEP_ALIVE / 2 < time.monotonic() - began < 5 * KEEP_ALIVE
            await healthy(port)

    asyncio.run(main())


def test_headers_that_trickle_do_not_keep_the_connection(folder: Path) -> None:
    async def trickle(client: Socket) -> float:
        began = time.monotonic()
        client.writer.write(b"GET /health HTTP/1.1\r\nX-A: ")
        while not client.reader.at_eof() and not client.writer.is_closing():
            client.writer.write(b"a")
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(KEEP_ALIVE / 10):
                    await client.reader.read(1)
        return time.monotonic() - began

    async def main() -> None:
        async with hasty(folder) as (_, port), contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(port)) for _ in range(50)]
            trickling = asyncio.gather(*map(trickle, clients))
            await healthy(port)
            assert max(await trickling) < 5 * KEEP_ALIVE
            await healthy(port)

    asyncio.run(main())


def test_bodies_that_trickle_are_408_all_of_them(folder: Path) -> None:
    async def trickle(client: Socket) -> bytes:
        client.writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
        answer = asyncio.ensure_future(client.reader.readuntil(b"}}\n"))
        while not answer.done():
            client.writer.write(b" ")
            await asyncio.wait([answer], timeout=0.02)
        return answer.result()

    async def main() -> None:
        async with (
            asyncio.timeout(WAIT),
            stand(folder, body_timeout=0.3) as served,
            contextlib.AsyncExitStack() as stack,
        ):
            clients = [await stack.enter_async_context(connected(served.port)) for _ in range(100)]
            trickling = asyncio.gather(*map(trickle, clients))
            await healthy(served.port)
            for answer in await trickling:
                assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"body_timeout"' in answer
                assert b"Connection: close" in answer
            assert served.workers.launched == 0
            await healthy(served.port)

    asyncio.run(main())


def test_chunks_without_end_are_refused_at_the_limit_and_cut_off(served: Runner) -> None:
    async def main() -> None:
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent = 0
        async with connected(served.stand.port) as client:
            client.writer.write(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            head = asyncio.ensure_future(client.head())
            with contextlib.suppress(ConnectionError):
                while not client.reader.at_eof():
                    client.writer.write(chunk)
                    await client.writer.drain()
                    await asyncio.sleep(0)
                    sent += 0 if head.done() else 65536
            assert (await head).startswith(b"HTTP/1.1 413 ") and b"Connection: close" in await head
        assert LIMIT < sent < 4 * LIMIT  # what lay in the buffers of both sides came on top

    check(served, main())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_refused_without_being_blown_up(served: Runner, encoding: str) -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(200)) + squeeze.flush()

    async def main() -> None:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(bomb)}\r\n\r\n"
        began = time.thread_time()
        answer = await served.stand.refusal(head.encode() + bomb)
        assert answer.startswith(b"HTTP/1.1 413 ") and b'"code":"body_too_large"' in answer
        assert time.thread_time() - began < 0.2  # the event loop's own share

    check(served, main())


def test_an_unknown_encoding_is_refused_before_the_body_is_sent(served: Runner) -> None:
    async def main() -> None:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Encoding: zstd\r\nContent-Length: 100\r\n\r\n"
        answer = await served.stand.refusal(head.encode())
        assert answer.startswith(b"HTTP/1.1 415 ") and b'"code":"unsupported_encoding"' in answer

    check(served, main())


def test_a_client_that_may_not_send_its_body_is_not_told_to_continue(served: Runner) -> None:
    async def main() -> None:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10000000000\r\n\r\n"
        answer = await served.stand.refusal(head.encode())
        assert b"HTTP/1.1 413 " in answer and b"Connection: close" in answer

    check(served, main())


def test_completions_may_be_pipelined(served: Runner) -> None:
    async def main() -> None:
        bodies = [b'{"prompt":"%02d","max_tokens":2}' % i for i in range(50)]
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n".encode()
        async with connected(served.stand.port) as client:
            client.writer.write(b"".join(head % len(body) + body for body in bodies) + CLOSING)
            answers = (await client.rest()).split(b"HTTP/1.1 200 OK")[1:]
        assert len(answers) == 51
        for i, answer in enumerate(answers[:50]):
            assert b'"text":"%02d"' % i in answer
        await healthy(served.stand.port)

    served.run(main())


def test_a_thousand_idle_connections_are_nobodys_burden(served: Runner) -> None:
    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(served.stand.port)) for _ in range(1000)]
            for client in clients:
                client.writer.write(HEALTH % b"")
            for client in clients:
                assert (await client.head()).startswith(b"HTTP/1.1 200 OK")
            for _ in range(20):
                await healthy(served.stand.port)
            status, answer = await served.stand.post(TEXT, {"prompt": "hello", "max_tokens": 5})
            assert (status, answer["choices"][0]["text"]) == (200, "hello")

    served.run(main())


def test_connections_are_closed_when_they_have_been_idle(folder: Path) -> None:
    async def main() -> None:
        async with hasty(folder) as (_, port), contextlib.AsyncExitStack() as stack:
            clients = []
            for _ in range(100):
                clients.append(client := await stack.enter_async_context(connected(port)))
                client.writer.write(HEALTH % b"")  # before the others connect: until then it is idle as well
            for answer in await asyncio.gather(*(client.rest() for client in clients)):
                assert answer.startswith(b"HTTP/1.1 200 OK")

    asyncio.run(main())


def test_a_million_keys_are_refused_and_fewer_are_read(served: Runner) -> None:
    def keys(count: int) -> bytes:
        return b"{%s}" % ",".join(f'"{i:x}":0' for i in range(count)).encode()

    assert len(keys(380_000)) < LIMIT < len(keys(1_000_000))

    async def main() -> None:
        status, answer = await served.stand.post(TEXT, keys(1_000_000))
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        status, answer = await served.stand.post(TEXT, keys(380_000))
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "missing_field", "prompt")

    check(served, main())


def test_of_duplicate_keys_the_last_one_counts(served: Runner) -> None:
    async def main() -> None:
        data = b'{"prompt":"first","prompt":"last","max_tokens":500,"max_tokens":4}'
        status, answer = await served.stand.post(TEXT, data)
        assert (status, answer["choices"][0]["text"]) == (200, "last")
        status, answer = await served.stand.post(TEXT, b'{"prompt":"x","temperature":9,"temperature":1,"n":1,"n":0}')
        assert status == 400

    served.run(main())


@pytest.mark.parametrize(("method", "status"), [("HEAD", b"200 OK"), ("OPTIONS", b"204 No Content")])
def test_answers_without_a_body_leave_the_connection_in_order(served: Runner, method: str, status: bytes) -> None:
    async def main() -> None:
        async with connected(served.stand.port) as client:
            client.writer.write(f"{method} /v1/models HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 3 + CLOSING)
            answers = (await client.rest()).split(b"HTTP/1.1 ")[1:]
        assert [answer.startswith(status) for answer in answers] == [True] * 3 + [method == "HEAD"]
        assert all(answer.endswith(b"\r\n\r\n") for answer in answers[:3])

    check(served, main())


def test_a_client_that_closes_its_half_counts_as_gone(served: Runner) -> None:
    async def main() -> None:
        body = b'{"prompt":"hello","max_tokens":5,"stream":true}'
        served.stand.workers.held = True
        async with connected(served.stand.port) as client:
            client.writer.write(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert (await client.head()).startswith(b"HTTP/1.1 200 OK")
            client.writer.write_eof()
            await client.rest()
        served.stand.workers.release()
        await healthy(served.stand.port)
        assert served.stand.workers.launched < 5

    served.run(main())
