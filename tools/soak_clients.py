"""The clients of a soak: some chat for as long as they may, others do what clients should not.

    python tools/soak_clients.py --port PORT --sockets 1000 --streams 1000 --abusers 20 --tokens 40

Until SIGTERM; then those who chat end what they began, and what came of everything is told as JSON on stdout:
{"kind: outcome": how often}. An outcome that is not among those expected of its kind begins with "unexpected".
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 240  # seconds until an answer that does not come counts as lost
PAUSE = 0.2  # of an abuser, after each deed
DIED_TWICE = "died twice"  # what the server says to a request whose worker was killed under it two times
TURNED_AWAY = "turned away"  # from a queue that others have filled
ANSWERED = {"whole", DIED_TWICE, TURNED_AWAY}
UPGRADE = (
    b"GET /v1/chat/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def posted(path: str, body: object, headers: str = "Connection: close\r\n") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def framed(body: object, kind: int = 1) -> bytes:
    """A masked frame of a WebSocket; the mask is zeros."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return bytes([0x80 | kind]) + size + bytes(4) + data


class Link:
    """A connection that decides about every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def status(self) -> int:
        """Of the answer, whose headers are read."""
        return int((await self.reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])

    async def frame(self) -> tuple[int, bytes]:
        """Kind and content of the next frame."""
        kind, size = await self.reader.readexactly(2)
        if size == 126:
            size = int.from_bytes(await self.reader.readexactly(2), "big")
        return kind & 15, await self.reader.readexactly(size)


class Crowd:
    def __init__(self, port: int, tokens: int) -> None:
        self._port, self._tokens = port, tokens
        self._random = random.Random(7)
        self.tally: Counter[str] = Counter()
        self.over = asyncio.Event()
        self._deeds: list[tuple[Callable[[Link], Awaitable[object]], set[object]]] = [
            (self.leaves_a_stream, {200, 503}),
            (self.closes_its_half, {"closed"}),
            (self.reads_nothing, {"left"}),
            (self.sends_a_bad_body, {400, 503}),  # 503 where the queue is full: before much is looked at
            (self.sends_too_much, {413}),
            (self.breaks_http, {400, 431}),
            (self.asks_too_long_a_prompt, {400, 503}),
            (self.sends_half_a_header, {"left"}),
            (self.floods, {"200 or 503"}),
            (self.cancels_on_a_socket, {"cancelled", "length", "queue_full"}),
            (self.sends_bad_frames, {1008}),
            (self.sends_a_binary_frame, {1003}),
            (self.cuts_a_socket, {"left"}),
        ]

    @contextlib.asynccontextmanager
    async def _linked(self, buffer: int = 0) -> AsyncIterator[Link]:
        """A connection; `buffer` is the system's for what was not read yet, in bytes."""
        own = socket.socket()
        if buffer:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", self._port))
        reader, writer = await asyncio.open_connection(sock=own, limit=1 << 16)
        try:
            yield Link(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _question(self) -> dict[str, object]:
        text = f"Tell me about {self._random.randrange(10**6)} and what comes after it."
        return {"messages": [{"role": "user", "content": text}], "max_tokens": self._tokens, "ignore_eos": True}

    # Those who chat

    async def streams(self) -> None:
        """One SSE stream after the other, each checked from the first byte to the last."""
        while not self.over.is_set():
            await self._counted("stream", self._stream(), ANSWERED)

    async def _stream(self) -> str:
        async with self._linked() as link:
            question = self._question() | {"stream": True, "stream_options": {"include_usage": True}}
            link.writer.write(posted(CHAT, question))
            if (status := await link.status()) != 200:
                await asyncio.sleep(PAUSE)
                return TURNED_AWAY if status == 503 else f"status {status}"
            text, tail = 0, b""
            while part := await link.reader.read(1 << 16):
                text += part.count(b'"content":')
                tail = (tail + part)[-4096:]
            if DIED_TWICE.encode() in tail:
                return DIED_TWICE
            done = tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and text > 0
            return "whole" if done and b'"completion_tokens":%d,' % self._tokens in tail else f"broken {tail[-200:]!r}"

    async def sockets(self) -> None:
        """A WebSocket with one conversation after the other; a new one where it closes."""
        while not self.over.is_set():
            await self._counted("socket", self._socket(), ANSWERED)

    async def _socket(self) -> str:
        async with self._linked() as link:
            await self._upgraded(link)
            for number in range(10):
                link.writer.write(framed({"type": "chat", "id": str(number), **self._question()}))
                last = await self._last(link)
                if last["type"] == "error" and DIED_TWICE in last["error"]["message"]:
                    return DIED_TWICE
                if last["type"] == "error" and last["error"]["code"] == "queue_full":
                    await asyncio.sleep(PAUSE)
                    return TURNED_AWAY
                if last["type"] != "done" or last["usage"]["completion_tokens"] != self._tokens:
                    return f"broken {str(last)[:200]}"
                self.tally["conversation: whole"] += 1
                if self.over.is_set():
                    break
            link.writer.write(framed((1000).to_bytes(2, "big"), 8))
            return "whole"

    async def _upgraded(self, link: Link) -> None:
        link.writer.write(UPGRADE)
        assert await link.status() == 101
        assert b'"hello"' in (await link.frame())[1]

    async def _last(self, link: Link) -> dict[str, Any]:
        """The last frame of a conversation; pings are answered."""
        while True:
            kind, data = await link.frame()
            if kind == 9:
                link.writer.write(framed(data, 10))
            elif kind == 8:
                return {"type": "closed", "code": int.from_bytes(data[:2], "big")}
            elif b'"type":"done"' in data or b'"type":"error"' in data:
                found: dict[str, Any] = json.loads(data)
                return found

    # Those who do what they should not

    async def abuses(self) -> None:
        while not self.over.is_set():
            deed, expected = self._random.choice(self._deeds)
            small = 4096 if deed == self.reads_nothing else 0

            async def work(deed: Callable[[Link], Awaitable[object]] = deed, small: int = small) -> object:
                async with self._linked(small) as link:
                    return await deed(link)

            await self._counted(deed.__name__.replace("_", " "), work(), expected)
            await asyncio.sleep(PAUSE)

    async def leaves_a_stream(self, link: Link) -> object:
        link.writer.write(posted(CHAT, self._question() | {"stream": True, "n": 2}))
        status = await link.status()
        await link.reader.read(self._random.choice([1, 300, 3000]))
        return status

    async def closes_its_half(self, link: Link) -> object:
        link.writer.write(posted(CHAT, self._question() | {"stream": True}))
        link.writer.write_eof()
        await link.reader.read()
        return "closed"

    async def reads_nothing(self, link: Link) -> object:
        link.writer.write(posted(TEXT, {"prompt": "x", "n": 8, "max_tokens": 500, "stream": True, "logprobs": 5}))
        await asyncio.sleep(3)
        return "left"

    async def sends_a_bad_body(self, link: Link) -> object:
        bodies = [b"{", b"\xff", b"[" * 10_000, {"messages": []}, {"messages": 5}, self._question() | {"n": 10**9}]
        link.writer.write(posted(CHAT, self._random.choice(bodies)))
        return await link.status()

    async def sends_too_much(self, link: Link) -> object:
        link.writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n".encode())
        return await link.status()

    async def breaks_http(self, link: Link) -> object:
        heads = [b"NONSENSE", b"GET / HTTP/1.1\r\nA : b", b"GET /" + b"x" * 9000 + b" HTTP/1.1"]
        link.writer.write(self._random.choice(heads) + b"\r\n\r\n")
        return await link.status()

    async def asks_too_long_a_prompt(self, link: Link) -> object:
        link.writer.write(posted(TEXT, {"prompt": "all work and no play " * 10_000, "max_tokens": 1}))
        return await link.status()

    async def sends_half_a_header(self, link: Link) -> object:
        link.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
        await asyncio.sleep(3)
        return "left"

    async def floods(self, link: Link) -> object:
        """Twenty requests at once, of sixteen choices each."""
        request = posted(CHAT, self._question() | {"n": 16, "max_tokens": 1})

        async def one() -> int:
            async with self._linked() as own:
                own.writer.write(request)
                status = await own.status()
                await own.reader.read()
                return status

        found = set(await asyncio.gather(*[one() for _ in range(20)]))
        return "200 or 503" if found <= {200, 503} else str(found)

    async def cancels_on_a_socket(self, link: Link) -> object:
        await self._upgraded(link)
        link.writer.write(framed({"type": "chat", "id": "a", **self._question()}))
        await asyncio.sleep(self._random.random())
        link.writer.write(framed({"type": "cancel", "id": "a"}))
        last = await self._last(link)
        return last.get("finish_reason") or last["error"]["code"]

    async def sends_bad_frames(self, link: Link) -> object:
        await self._upgraded(link)
        link.writer.write(framed({"type": "nothing"}) * 40)
        return await self._code(link)

    async def sends_a_binary_frame(self, link: Link) -> object:
        await self._upgraded(link)
        link.writer.write(framed(b"\0" * 100, 2))
        return await self._code(link)

    async def _code(self, link: Link) -> object:
        while (found := await link.frame())[0] != 8:
            pass
        return int.from_bytes(found[1][:2], "big")

    async def cuts_a_socket(self, link: Link) -> object:
        await self._upgraded(link)
        for id in "abcd":
            link.writer.write(framed({"type": "chat", "id": id, **self._question()}))
        await asyncio.sleep(self._random.random())
        link.writer.transport.abort()
        return "left"

    async def _counted(self, name: str, work: Awaitable[object], expected: set[object]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                outcome = await work
        except (OSError, asyncio.IncompleteReadError, TimeoutError, AssertionError) as error:
            outcome = f"{type(error).__name__} {error}"
        self.tally[f"{name}: {outcome}" if outcome in expected else f"unexpected {name}: {outcome}"] += 1


async def run(args: argparse.Namespace) -> Counter[str]:
    crowd = Crowd(args.port, args.tokens)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, crowd.over.set)
    async with asyncio.TaskGroup() as tasks:
        for work, count in ((crowd.sockets, args.sockets), (crowd.streams, args.streams), (crowd.abuses, args.abusers)):
            for number in range(count):
                tasks.create_task(work())
                if number % 50 == 49:
                    await asyncio.sleep(0.1)
    return crowd.tally


def main() -> int:
    parser = argparse.ArgumentParser(description="the clients of a soak")
    for name, default in (("port", None), ("sockets", 1000), ("streams", 1000), ("abusers", 20), ("tokens", 40)):
        parser.add_argument(f"--{name}", type=int, default=default, required=default is None)
    print(json.dumps(uvloop.run(run(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
