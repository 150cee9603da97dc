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
EVERY = sizes(ROWS, BUDGET)
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
        self.nodes = self.shared = 0
        self.room = room
        for name, value in {
            "reset_peak_memory_stats": lambda: None, "synchronize": lambda: None, "empty_cache": lambda: None,
            "memory_allocated": lambda: 0, "max_memory_allocated": lambda: ACTIVATIONS,
            "memory_reserved": lambda: self.shared,
            "mem_get_info": lambda: (TOTAL - CONTEXT - self.nodes - self.shared, TOTAL),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(memory, "Capture", lambda: self.capture)

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if len(self.captured) == self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.shared = SHARED  # the largest forward comes first
        self.nodes += OWN
        self.captured.append(work)
        return work


def test_graphs_take_what_they_share_once_and_what_each_needs_for_every_size(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    budget = dict(memory.measured(lambda: runner, EVERY, True))
    forwards = [size for size in EVERY if isinstance(size, Forward)]
    assert budget[memory.ACTIVATIONS] == ACTIVATIONS
    # What the one drawing took is shared out among the forwards.
    own = gpu.nodes // (len(gpu.captured) - 1)
    draws = len(EVERY) - len(forwards)
    assert budget[memory.GRAPHS] == SHARED + len(forwards) * own + draws * own // memory.DRAW_SHARE
    assert OWN <= own <= 1.5 * OWN


def test_without_graphs_none_are_reserved(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    budget = dict(memory.measured(lambda: runner, EVERY, False))
    assert (budget[memory.GRAPHS], gpu.captured, budget[memory.OTHERS]) == (0, [], CONTEXT)


def test_one_worker_captures_the_common_sizes_and_leaves_the_rest(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu(monkeypatch)
    heard: list[float] = []
    memory.capture(runner, EVERY, heard.append, 50, 1)
    assert len(runner.graphs) == len(early(EVERY)) == len(heard) and heard[-1] == 1
    assert set(runner.graphs.pending) == set(EVERY) - set(early(EVERY))
    assert Forward(True, ROWS + BUDGET, ROWS) not in runner.graphs.pending
    assert Draw(TOP, ROWS) not in runner.graphs.pending


def test_ranks_capture_everything_at_once(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later they would have to agree on when."""
    Gpu(monkeypatch)
    monkeypatch.setattr(runner.tp, "size", 2)
    monkeypatch.setattr(runner.tp, "broadcast", lambda x: x)
    monkeypatch.setattr(runner.tp, "all_reduce", lambda x: x)
    monkeypatch.setattr(runner.tp, "gather_vocab", lambda x: x)
    memory.capture(runner, EVERY, lambda fraction: None, 50, 1)
    assert not runner.graphs.pending and len(runner.graphs) == len(EVERY)


def test_graphs_that_do_not_fit_name_the_flags_that_help(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, room=3)
    wanted, tokens = len(early(EVERY)), 10**6
    fewer = tokens - -(-(wanted - 3) * (SHARED + 3 * OWN) // 3 // 1000)
    text = rf"3 of {wanted} graphs fit beside .* --mem_fraction, or --max_total_token_num to {fewer}, .*--disable_cuda"
    with pytest.raises(MemoryError, match=text):
        memory.capture(runner, EVERY, lambda fraction: None, tokens, 1000)


@pytest.mark.parametrize(
    ("made", "taken", "fits"), [(0, 100, 0), (5, 100, 980), (5, -3, 1000), (1, 10**9, 0), (9, 90, 999)]
)
def test_what_graphs_still_need_is_taken_from_the_cache(made: int, taken: int, fits: int) -> None:
    assert memory.beside_graphs(1000, 10, made, 15 if made == 5 else 10, taken) == fits
