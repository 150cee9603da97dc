"""What is measured, on a GPU whose figures are made up: every size that is computed takes memory, and says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model

from aiollm.wire.messages import Loading, WorkerSettings
from aiollm.workers import memory
from aiollm.workers.load import load
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import TOP, Draw, Forward, early, sizes

ROWS, BUDGET = 4, 12
TOTAL, CONTEXT = 1 << 30, 300 << 20
ACTIVATIONS, SHARED, OWN = 50 << 20, 70 << 20, 3 << 20


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    def nobody(message: Loading) -> None:
        pass

    settings = WorkerSettings(folder=str(write_tiny_model(tmp_path)), rows=ROWS, slots=50, chunk_budget=BUDGET)
    return load(settings, nobody).runner


class Gpu:
    """Memory in use: what processes, graphs and steps took. The largest forward comes first."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int = 10**6) -> None:
        self.captured: list[Any] = []
        self.graphs = 0
        self.room = room
        for name, value in {
            "reset_peak_memory_stats": lambda: None, "synchronize": lambda: None, "empty_cache": lambda: None,
            "memory_allocated": lambda: 0, "max_memory_allocated": lambda: ACTIVATIONS, "memory_reserved": lambda: 0,
            "mem_get_info": lambda: (TOTAL - CONTEXT - self.graphs, TOTAL),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(memory, "Capture", lambda: self.capture)

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if len(self.captured) == self.room:
            raise torch.OutOfMemoryError("no room")
        self.graphs += OWN if self.captured else OWN + SHARED
        self.captured.append(work)
        return work


def test_graphs_take_what_they_share_once_and_what_each_needs_for_every_size(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch)
    budget = dict(memory.measured(lambda: runner, True))
    assert budget[memory.ACTIVATIONS] == ACTIVATIONS
    # The first two of those captured count as shared, the third shows what one more takes.
    assert budget[memory.GRAPHS] == SHARED + 2 * OWN + OWN * len(sizes(ROWS, BUDGET))


def test_without_graphs_none_are_reserved(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    budget = dict(memory.measured(lambda: runner, False))
    assert (budget[memory.GRAPHS], gpu.captured, budget[memory.OTHERS]) == (0, [], CONTEXT)


def test_one_worker_captures_the_common_sizes_and_leaves_the_rest(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch)
    heard: list[float] = []
    memory.capture(runner, heard.append)
    every = sizes(ROWS, BUDGET)
    assert len(runner.graphs) == len(early(every)) == len(heard) and heard[-1] == 1
    assert set(runner.graphs.pending) == set(every) - set(early(every))
    assert Forward(True, ROWS + BUDGET, ROWS) not in runner.graphs.pending
    assert Draw(TOP, ROWS) not in runner.graphs.pending


def test_ranks_capture_everything_at_once(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later they would have to agree on when."""
    Gpu(monkeypatch)
    monkeypatch.setattr(runner.tp, "size", 2)
    monkeypatch.setattr(runner.tp, "broadcast", lambda x: x)
    monkeypatch.setattr(runner.tp, "all_reduce", lambda x: x)
    monkeypatch.setattr(runner.tp, "gather_vocab", lambda x: x)
    memory.capture(runner, lambda fraction: None)
    assert not runner.graphs.pending and len(runner.graphs) == len(sizes(ROWS, BUDGET))


def test_graphs_that_do_not_fit_name_the_flags_that_help(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, room=3)
    with pytest.raises(MemoryError, match=r"3 of \d+ graphs fit: lower --mem_fraction .*--disable_cudagraph"):
        memory.capture(runner, lambda fraction: None)
