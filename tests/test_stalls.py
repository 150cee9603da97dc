"""The event loop never stalls: huge prompts and bodies do not hold up the tokens and probes of others.

A real server serves a model of a million tokens of context. While one client streams and another one asks for /health,
a third sends something huge. What the huge request adds to the longest pause that a client sees is the delay.
"""

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

CONTEXT = 1 << 20
DELAY = 0.050  # seconds that a huge request may add
ROUNDS = 5  # a stall comes every time, the noise of a busy machine does not: the median tells them apart
QUIET = 0.5  # seconds without a huge request, before each
FLAGS = (
    "--threads", "1", "--max_total_token_num", str(2 * CONTEXT + 200_000), "--running_max_req_size", "4",
    "--chunked_prefill_size", "64",
)  # fmt: skip
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LINE = "It was a bright cold day in April, and the clocks were striking thirteen. \u00e9\u4e2d\n"


def text(size: int) -> str:
    """So many bytes of text, or a little fewer."""
    return LINE * (size // len(LINE.encode()))


def body(**fields: object) -> bytes:
    return json.dumps({"max_tokens": 1, **fields}, ensure_ascii=False).encode()


# name -> path, body, expected status. A prompt that fills the context is refused once it is tokenized: computing it
# would take hours.
HUGE: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "1 MB prompt": (TEXT, lambda: body(prompt="x" * CONTEXT), 400),
    "1 MB chat": (CHAT, lambda: body(messages=[{"role": "user", "content": text(CONTEXT + 100)}]), 400),
    "5 MB prompt": (TEXT, lambda: body(prompt=text(5_000_000)), 400),
    "5 MB of ids": (TEXT, lambda: body(prompt=[100] * 1_000_000 + [300]), 400),
    "5 MB of messages": (CHAT, lambda: body(messages=[{"role": "user", "content": "x" * 9}] * 110_000), 400),
    "5 MB of other fields": (TEXT, lambda: body(prompt="x", other=[{"a": i} for i in range(420_000)]), 200),
}


class Pauses(NamedTuple):
    """The longest pause between two tokens, and the longest answer to /health, in seconds."""

    token: float
    health: float


class Watch:
    """Two clients in threads: one streams tokens, the other asks for /health again and again."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self._address = (str(at.hostname), int(at.port or 80))
        self._events: list[float] = []
        self._probes: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._stream), threading.Thread(target=self._probe)]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        while len(self._events) < 50:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def pauses(self, since: float, until: float) -> Pauses:
        """Of what overlaps the time from `since` to `until`."""
        events = self._events.copy()
        gaps = [b - a for a, b in zip(events, events[1:], strict=False) if b > since and a < until]
        asked = [b - a for a, b in self._probes.copy() if b > since and a < until]
        return Pauses(max(gaps), max(asked))

    def _stream(self) -> None:
        data = body(prompt="hi", max_tokens=150_000, ignore_eos=True, stream=True)
        with socket.create_connection(self._address, 30) as client:
            client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (TEXT.encode(), len(data)) + data)
            while not self._over.is_set() and client.recv(1 << 16):
                self._events.append(time.monotonic())

    def _probe(self) -> None:
        with socket.create_connection(self._address, 30) as client:
            while not self._over.wait(0.002):
                began = time.monotonic()
                client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
                self._probes.append((began, time.monotonic()))


def post(url: str, path: str, data: bytes) -> int:
    """The status of the answer."""
    at = urlsplit(url)
    with socket.create_connection((str(at.hostname), int(at.port or 80)), 60) as client:
        client.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data))
        )
        client.sendall(data)
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    return int(answer.split(b" ", 2)[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("long")
    write_tiny_model(
        folder, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, num_hidden_layers=1, num_key_value_heads=1
    )
    write_byte_tokenizer(folder)
    with Server("--model_dir", str(folder), *FLAGS) as running:
        yield running


@pytest.mark.parametrize("name", HUGE)
def test_what_is_huge_delays_nobody_else(server: Server, name: str) -> None:
    path, make, status = HUGE[name]
    data = make()
    quiet, loud, took = [], [], []
    with Watch(server.url) as watch:
        for _ in range(ROUNDS):
            time.sleep(QUIET)
            began = time.monotonic()
            quiet.append(watch.pauses(began - QUIET, began))
            assert post(server.url, path, data) == status
            took.append(time.monotonic() - began)
            loud.append(watch.pauses(began, time.monotonic()))
    for field in Pauses._fields:
        before = statistics.median(getattr(pauses, field) for pauses in quiet)
        during = statistics.median(getattr(pauses, field) for pauses in loud)
        worst = max(getattr(pauses, field) for pauses in loud)
        figures = f"{field} {1e3 * before:.1f} -> {1e3 * during:.1f} ms (worst {1e3 * worst:.1f})"
        print(f"{name}, {statistics.median(took):.2f} s: {figures}")
        assert during - before < DELAY, figures
