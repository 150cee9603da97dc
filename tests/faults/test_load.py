"""More than fits: queues, long prompts and outputs that overflow every limit, at real servers."""

import json
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from calm import calm, until, warm_up
from serving import Server

TEXT = "/v1/completions"
SMALL_POOL, ROWS, QUEUE = 600, 4, 20
FLAGS = (
    "--data_type", "fp32", "--threads", "1", "--max_total_token_num", str(SMALL_POOL),
    "--running_max_req_size", str(ROWS), "--max_queue", str(QUEUE), "--schedule_policy", "aggressive",
)  # fmt: skip


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS) as server:
        warm_up(server)
        yield server


@pytest.fixture
def full(small: Server) -> Iterator[Server]:
    """A server with room for little."""
    with calm(small):
        yield small


def ask(server: Server, **fields: Any) -> list[list[int]]:
    """Token ids of each choice."""
    body = {"prompt": [72, 105], "max_tokens": 100, "ignore_eos": True, "return_token_ids": True, **fields}
    return [choice["token_ids"] for choice in server.post(TEXT, body)["choices"]]


def sent(server: Server, body: dict[str, Any]) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), 60)
    data = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def answer(client: socket.socket) -> tuple[int, bytes, dict[str, Any]]:
    """Status, headers and body."""
    data = b""
    with client:
        while part := client.recv(1 << 16):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, json.loads(body)


def test_ten_times_what_may_wait_is_turned_away_and_who_waits_is_served(full: Server) -> None:
    clients = [sent(full, {"prompt": "hi", "max_tokens": 20, "ignore_eos": True}) for _ in range(10 * QUEUE)]
    answers = [answer(client) for client in clients]
    served = [body for status, _, body in answers if status == 200]
    turned = [(head, body) for status, head, body in answers if status == 503]
    assert len(served) >= QUEUE and len(served) + len(turned) == 10 * QUEUE
    assert all(body["usage"]["completion_tokens"] == 20 for body in served)
    assert all(b"Retry-After: " in head and body["error"]["code"] == "queue_full" for head, body in turned)


def test_a_full_queue_says_so_at_once(full: Server) -> None:
    body = {"prompt": "hi", "max_tokens": 250, "ignore_eos": True}
    took: list[float] = []
    while not took:
        waiting = [sent(full, body) for _ in range(QUEUE + ROWS)]
        until(lambda: full.metric("aiollm_num_requests_waiting") == QUEUE)
        for _ in range(20):
            began = time.monotonic()
            status, _, _ = answer(sent(full, {**body, "max_tokens": 1}))
            if status != 503:
                break  # the first of them have ended: there is room
            took.append(time.monotonic() - began)
        for client in waiting:
            client.close()
        until(lambda: full.metric("aiollm_num_requests_waiting") == 0)
    assert min(took) < 0.1


def test_outputs_that_overflow_the_cache_are_paused_and_lose_no_token(full: Server) -> None:
    prompts = [[65 + i] * (10 * i + 1) for i in range(4)]
    alone = [ask(full, prompt=prompt, max_tokens=220, temperature=0.9, seed=3) for prompt in prompts]
    before = full.metric("aiollm_num_preemptions_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        crowded = list(
            pool.map(lambda prompt: ask(full, prompt=prompt, max_tokens=220, temperature=0.9, seed=3), prompts)
        )
    assert crowded == alone
    assert full.metric("aiollm_num_preemptions_total") > before


def test_choices_that_fit_the_cache_one_after_the_other_are_all_served(full: Server) -> None:
    choices = ask(full, n=QUEUE, max_tokens=150, temperature=1.0, seed=1)
    assert [len(tokens) for tokens in choices] == [150] * QUEUE


def test_a_burst_of_long_prompts_is_served_beside_a_stream(server: Server) -> None:
    """24 prompts of nearly the whole context want twice the cache; who streams goes on meanwhile."""
    arrivals = []
    stream = sent(server, {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True})
    assert stream.recv(1 << 16).startswith(b"HTTP/1.1 200")
    burst = [sent(server, {"prompt": [i] * 1950, "max_tokens": 4, "ignore_eos": True}) for i in range(24)]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: [answer(client) for client in burst])
        with stream:
            while stream.recv(1 << 16):
                arrivals.append(time.monotonic())
        for status, _, body in answers.result():
            assert (status, body["usage"]["completion_tokens"]) == (200, 4)
    assert max(after - before for before, after in pairwise(arrivals)) < 5


def test_figures_may_be_asked_for_a_hundred_times_a_second(server: Server) -> None:
    stream = sent(server, {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True})
    took = []
    for _ in range(100):
        began = time.monotonic()
        assert server.metric("aiollm_ready") == 1
        took.append(time.monotonic() - began)
    stream.close()
    assert statistics.median(took) < 0.2
