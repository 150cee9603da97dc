"""tools/bench_shapes.py on a CPU, with ceilings that are made up: shapes that fail, the limit of time, the floors."""

import json
import sys
from pathlib import Path
from typing import Any

import bench_shapes
import pytest

from aiollm.workers.families.registry import describe

BEST = bench_shapes.Ceilings(copy=1e12, matmul=1e14, bare=0.5)
TINY: dict[str, Any] = bench_shapes.SHAPES["command-r7b"] | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000, "max_position_embeddings": 512, "sliding_window": 20,
}  # fmt: skip
FLAGS = ("--device", "cpu", "--data_type", "fp32", "--threads", "1", "--max_total_token_num", "2000")


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them; the folder of one lacks what a server needs."""
    monkeypatch.setattr(bench_shapes, "ceilings", lambda: BEST)
    monkeypatch.setattr(bench_shapes, "ROWS", ("start", "smoke"))
    monkeypatch.setattr(bench_shapes, "SHAPES", {"broken": TINY, "tiny": TINY})

    def write(folder: Path, config: dict[str, Any]) -> Path:
        folder.mkdir()
        return folder if folder.name == "broken" else written(folder, config)

    written = bench_shapes.write
    monkeypatch.setattr(bench_shapes, "write", write)


def run(monkeypatch: pytest.MonkeyPatch, saved: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was saved."""
    command = ["bench_shapes.py", "--shapes", "broken", "tiny", "--save", str(saved), *options, "--", *FLAGS]
    monkeypatch.setattr(sys, "argv", command)
    return bench_shapes.main(), json.loads(saved.read_text())


def test_a_shape_that_fails_is_told_and_the_next_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(monkeypatch, tmp_path / "found.json")
    assert code == 1 and found["ceilings"] == BEST._asdict() and "torch" in found["machine"]
    lost, broken, start, smoke = found["rows"]
    assert "config.json" in lost["error"] and "does not start" in broken["error"]
    assert start["measured"] == start["figures"]["ready_seconds"] and start["unit"] == "s"
    assert start["share"] == pytest.approx(0.5 / start["measured"], abs=1e-3), "these weights are nothing beside it"
    assert smoke["measured"] == smoke["figures"]["median_tpot_ms"] and 0 <= smoke["share"] < 1
    assert capsys.readouterr().out.count("FAILED") == 2


def test_when_time_is_up_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(monkeypatch, tmp_path / "found.json", "--seconds", "0")
    assert code == 1 and {row["error"] for row in found["rows"]} == {"no time left (--seconds)"}
    assert capsys.readouterr().out.count("FAILED") == 4


def test_a_step_reads_weights_once_and_what_each_row_sees() -> None:
    spec = describe(TINY)[0]
    every, read = bench_shapes.weights(spec)
    attention, mlp = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96
    assert every == read == 4 * (attention + mlp + 64) + 1000 * 64 + 64, "the embedding is the output layer too"
    slow = BEST._replace(copy=1.0, matmul=1e30)
    contexts = [31, 32, 33]  # of the second to the fourth token behind 30; three of four layers see 20
    keys = 2 * 2 * 16 * sum(3 * 20 + context for context in contexts) / 3
    assert bench_shapes.step_floor(spec, 5, 30, 4, slow) == pytest.approx(2 * (read + 5 * keys))


def test_with_many_rows_operations_are_the_floor() -> None:
    spec = describe(TINY)[0]
    seen = 4 * 2 * 16 * 2 * (3 * 20 + 32)  # four heads; scores and values of 16; 32 tokens on average
    read = bench_shapes.weights(spec)[1]
    slow = BEST._replace(copy=1e30, matmul=1.0)
    assert bench_shapes.step_floor(spec, 256, 30, 4, slow) == pytest.approx(256 * (2 * read + seen))


def test_an_output_layer_of_its_own_is_read_and_the_embedding_is_not() -> None:
    spec = describe(TINY | {"tie_word_embeddings": False})[0]
    every, read = bench_shapes.weights(spec)
    assert every - read == 1000 * 64
