"""The summary of a trace, and files that are none."""

import json
from pathlib import Path

import pytest

from aiollm.trace import Iteration, group, main, share, summary


def iteration(number: int, rows: int, gap: float = 0.0, chunks: int = 0, no_work: float = 0.0) -> Iteration:
    name = f"mixed {rows} + {chunks}" if chunks else f"decode {rows}"
    return Iteration(number * 1e4, name, number, rows, chunks, 0, 1000.0, gap, no_work)


RUN = [
    *(iteration(at, 1, gap=10.0) for at in range(10)),
    *(iteration(at, 256, gap=30.0) for at in range(10, 20)),
    iteration(20, 200, gap=900.0, chunks=512),
    iteration(21, 1, no_work=5e6),
]


def test_gaps_are_told_in_all_and_by_the_size_of_the_batch() -> None:
    lines = summary(RUN).splitlines()
    found = {line[:18].strip(): line.split() for line in lines[1:5]}
    assert list(found) == ["all", "1 rows", "129 to 256 rows", "chunks, 129 to 256 rows"[:18].strip()]
    assert "5.91%" in found["all"] and share(RUN) == pytest.approx(1300 / 22_000)
    assert "0.91%" in found["1 rows"], "ten gaps of 10 us in eleven iterations; waiting for work is none"
    assert "3.00%" in found["129 to 256 rows"]
    assert any("90.00%" in line for line in lines)
    assert "no work for 5.000 s" in lines
    assert "gap of 0.900 ms before iteration 20 (mixed 200 + 512) at 0.200 s" in lines


@pytest.mark.parametrize(("rows", "upto"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048)])
def test_batches_are_grouped_by_powers_of_two(rows: int, upto: int) -> None:
    assert group(iteration(0, rows)) == (False, upto)


def test_a_part_of_a_trace_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    args = {"iteration": 1, "rows": 2, "chunk_tokens": 0, "stalled": 0, "device_us": 5, "gap_us": 1, "no_work_us": 0}
    path.write_text(json.dumps([{"ph": "M", "args": {}}, {"ph": "X", "ts": 3e6, "name": "decode 2", "args": args}]))
    assert main([str(path)]) == 0 and "2 rows" in capsys.readouterr().out
    assert main([str(path), "--begin", "3.5"]) == 0 and capsys.readouterr().out == "no iterations\n"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"ph": "X", "args": {"device_us": 1}}]'])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    assert "trace" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
