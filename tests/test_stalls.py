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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import write_byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

pytestmark = pytest.mark.timing

CONTEXT = 1 << 20
VOCAB_SIZE = 2000
DELAY = 0.050  # seconds that a huge request may add
ROUNDS = 5  # a stall comes every time, the noise of a busy machine does not: the least of them tells them apart
QUIET = 0.5  # seconds without a huge request, before each
FLAGS = (
    "--threads", "1", "--max_total_token_num", str(2 * CONTEXT + 200_000), "--running_max_req_size", "4",
    "--chunked_prefill_size", "64",
)  # fmt: skip
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROSE = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def text(size: int) -> str:
    """So many characters."""
    return (PROSE * (size // len(PROSE) + 1))[:size]


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def chat(*contents: str) -> bytes:
    return body(messages=[{"role": "user", "content": content} for content in contents], max_tokens=CONTEXT)


# What is asked for fits into no context, so that it is refused as soon as it is tokenized.
HUGE: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "prompt of 1 MB": (TEXT, lambda: body(prompt=text(1_000_000), max_tokens=CONTEXT), 400),
    "prompt of 5 MB": (TEXT, lambda: body(prompt=text(5_000_000), max_tokens=CONTEXT), 400),
    "a million ids": (TEXT, lambda: body(prompt=[100] * 1_000_000, max_tokens=CONTEXT), 400),
    "message of 1 MB": (CHAT, lambda: chat(text(1_000_000)), 400),
    "5 MB of messages": (CHAT, lambda: chat(*[text(1000)] * 4800), 400),
    "5 MB of other fields": (TEXT, lambda: body(prompt="x", max_tokens=1, x=[{"a": i} for i in range(420_000)]), 200),
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
        gaps = [b - a for a, b in pairwise(events) if b > since and a < until]
        asked = [b - a for a, b in self._probes.copy() if b > since and a < until]
        return Pauses(max(gaps), max(asked))

    def _stream(self) -> None:
        data = body(prompt="hi", max_tokens=150_000, ignore_eos=True, stream=True)
        with socket.create_connection(self._address, 30) as client:
            client.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
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
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        answer = b""
        while part := client.recv(1 << 16):
            answer += part
    return int(answer.split(b" ", 2)[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tokenizer with some 3 characters to a token, and a model so small that a step takes a millisecond."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("long"))
    write_tiny_model(
        folder, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, num_hidden_layers=1, num_key_value_heads=1
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        PROSE.splitlines(True),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with Server("--model_dir", str(folder), *FLAGS) as running:
        yield running


def least(pauses: list[Pauses]) -> Pauses:
    return Pauses(*map(min, zip(*pauses, strict=True)))


@pytest.mark.parametrize("name", HUGE)
def test_what_is_huge_delays_nobody_else(server: Server, name: str) -> None:
    path, make, status = HUGE[name]
    data = make()
    spans: list[tuple[float, float]] = []
    with Watch(server.url) as watch:
        time.sleep(QUIET)
        for _ in range(ROUNDS):
            began = time.monotonic()
            assert post(server.url, path, data) == status
            spans.append((began, time.monotonic()))
            time.sleep(QUIET)
        quiet = [watch.pauses(began - QUIET, began) for began, _ in spans]
        loud = [watch.pauses(began, ended) for began, ended in spans]
    before, during = least(quiet), least(loud)
    added = Pauses(during.token - before.token, during.health - before.health)
    took = statistics.median(ended - began for began, ended in spans)
    worst = max(max(pauses) for pauses in loud)
    figures = (
        f"{name}, {took:.2f} s: tokens {1e3 * before.token:.1f} -> {1e3 * during.token:.1f} ms, "
        f"/health {1e3 * before.health:.1f} -> {1e3 * during.health:.1f} ms, worst {1e3 * worst:.0f} ms"
    )
    print(figures)
    assert max(added) < DELAY, figures


def test_a_huge_prompt_that_runs_delays_no_probe(server: Server) -> None:
    """It is admitted and computed in chunks until the client hangs up; the worker is busy, the server is not."""
    data = body(prompt=[100, 101] * (CONTEXT // 2 - 10), max_tokens=1)
    at = urlsplit(server.url)
    delays = []
    with Watch(server.url) as watch:
        for _ in range(ROUNDS):
            began = time.monotonic()
            with socket.create_connection((str(at.hostname), int(at.port or 80)), 30) as client:
                head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
                client.sendall(head.encode() + data)
                while server.metric("aiollm_num_requests_running") < 2:
                    time.sleep(0.02)
            while server.metric("aiollm_num_requests_running") > 1:
                time.sleep(0.02)
            delays.append(watch.pauses(began, time.monotonic()).health)
    print(f"a million ids that run: health {[round(1e3 * delay) for delay in delays]} ms")
    assert min(delays) < DELAY


def test_the_metrics_tell_how_late_the_loop_was(server: Server) -> None:
    before = server.metric("aiollm_event_loop_lag_seconds_count")
    time.sleep(0.6)
    assert server.metric("aiollm_event_loop_lag_seconds_count") > before
