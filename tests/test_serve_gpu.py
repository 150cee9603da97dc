"""The whole server on a GPU says what it says on a CPU: with graphs and without, alone and in a crowd.

A tiny model in fp32, so that tokens can be compared one by one.
"""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

pytestmark = pytest.mark.gpu

FLAGS = (
    "--data_type", "fp32", "--running_max_req_size", "24", "--batch_max_tokens", "96", "--max_total_token_num", "4096",
)  # fmt: skip
SECONDS = 120.0
GENERATED = "aiollm_generation_tokens_total"
PROMPTS = [[(7 * i + seed) % 97 for i in range(3 + 11 * (seed % 9))] for seed in range(40)]
REAL_LIFE = {
    "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.4, "frequency_penalty": 0.2,
    "repetition_penalty": 1.1, "logit_bias": {"5": 2.0}, "logprobs": 5, "min_tokens": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)
    return write_byte_tokenizer(made)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), "--device", "cuda", *FLAGS) as running:
        yield running


def answers(server: Server, at_once: int, **fields: Any) -> list[list[int]]:
    """The token ids after each prompt, so many requests at a time."""

    def one(prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
        body |= {"seed": len(prompt)} | fields
        found: list[int] = server.post("/v1/completions", body)["choices"][0]["token_ids"]
        return found

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, PROMPTS))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy, on a CPU."""
    with Server("--model_dir", str(folder), "--device", "cpu", *FLAGS) as cpu:
        return answers(cpu, 1)


@pytest.mark.parametrize("at_once", [1, 24])
def test_greedy_tokens_are_those_of_a_cpu(server: Server, expected: list[list[int]], at_once: int) -> None:
    assert answers(server, at_once) == expected


def test_with_everything_on_tokens_do_not_depend_on_the_neighbours(server: Server) -> None:
    assert answers(server, 24, **REAL_LIFE) == answers(server, 1, **REAL_LIFE)


def test_without_graphs_the_same_is_said(folder: Path, server: Server, expected: list[list[int]]) -> None:
    flags = ("--model_dir", str(folder), "--device", "cuda", "--disable_cudagraph", *FLAGS)
    with Server(*flags) as eager:
        assert answers(eager, 24) == expected
        assert answers(eager, 24, **REAL_LIFE) == answers(server, 24, **REAL_LIFE)


def test_a_worker_that_is_killed_costs_no_token(server: Server, expected: list[list[int]]) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(answers, server, 24)
        (victim,) = server.workers()
        before, deadline = server.metric(GENERATED), time.monotonic() + SECONDS
        while server.metric(GENERATED) < before + 100:
            assert time.monotonic() < deadline
        os.kill(victim, signal.SIGKILL)
        assert found.result() == expected


def test_memory_is_told_part_by_part(server: Server) -> None:
    for part in ("weights", "row tables", "activations of the largest step", "graphs", "driver, kernels", "KV cache"):
        assert part in server.log()


def test_a_cache_that_does_not_fit_is_refused_with_the_size_that_would(folder: Path) -> None:
    flags = ("--model_dir", str(folder), "--device", "cuda", *FLAGS[:-1], "2000000000")
    with Server(*flags, ready=False) as running:
        assert running.process.wait(SECONDS) == 1
        said = r"--max_total_token_num 2000000000 does not fit beside weights of .*: at most about \d+ would"
        assert re.search(said, running.log())
