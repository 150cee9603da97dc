"""tools/bench_gpu.py on a CPU: rows beside their baselines, rows that fail, servers that die."""

import json
import sys
from pathlib import Path

import bench_gpu
import pytest
import shapes
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

from aiollm.text.tokenizer import Tokenizer


def test_rows_that_fail_are_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved = tmp_path / "qwen3-0.6b", tmp_path / "found.json"
    write_tiny_model(folder, "qwen3", vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(folder)
    rows = ["prefill", "single", "cpu-c1", "smoke"]  # prompts of 4096 tokens exceed the tiny model's context
    measured = bench_gpu.run_row

    def with_an_accident(server: bench_gpu.Server, workload: str, *rest: object) -> dict[str, object]:
        if workload == "cpu-c1":
            server.process.kill()
            server.process.wait()
        return measured(server, workload, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_gpu, "run_row", with_an_accident)
    monkeypatch.setattr(
        sys, "argv",
        [
            "bench_gpu.py", "--model", str(folder), "--workloads", *rows, "--no-baseline-flags", "--token-ids", "3:250",
            "--procs", "1", "--save", str(saved), "--traces", str(tmp_path / "traces"),
            "--", "--threads", "1", "--max_total_token_num", "4000",
        ],
    )  # fmt: skip
    assert bench_gpu.main() == 1, "rows have failed"
    found = {row["workload"]: row for row in json.loads(saved.read_text())["rows"]}
    assert "maximum context length" in found["prefill"]["error"]
    assert "the server ended with" in found["cpu-c1"]["error"]
    assert found["smoke"]["figures"]["completed"] == 4, "a new server took its place"
    figures, (compared,) = found["single"]["figures"], found["single"]["compared"]
    assert (compared["metric"], compared["vllm"], compared["must"]) == ("median_tpot_ms", 1.85, 1.35)
    assert compared["ratio"] == pytest.approx(1.85 / figures["median_tpot_ms"], rel=0.01)
    assert compared["kept"] == (figures["median_tpot_ms"] <= 1.35)
    assert figures["iterations"] >= 4 * 256 and 0 < figures["server_cpu_share"] < 1.5
    assert figures["loop_lag_p99_ms"] > 0 and figures["device_gap_share"] >= 0
    assert figures["trace"][1].split()[:2] == ["all", str(int(figures["iterations"]))], "of this row alone"
    assert len(list((tmp_path / "traces").iterdir())) == 2, "one for each server"
    assert found["start"]["figures"]["kv_tokens"] == 4000 and found["start"]["figures"]["ready_seconds"] > 0
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 2 and "median_tpot_ms" in printed


def test_a_server_that_does_not_start_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench_gpu.py", "--model", str(tmp_path), "--workloads", "single", "smoke", "--no-baseline-flags"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_gpu.main() == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3 and printed.count("the server did not start") == 1
    assert "config.json" in printed


def test_a_row_ends_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        url = "http://127.0.0.1:9"  # nobody listens there, and the client waits for a server

    monkeypatch.setattr(bench_gpu, "Look", lambda server: None)
    options = bench_gpu.argparse.Namespace(procs=1, token_ids="3:9", row_seconds=1.5)
    with pytest.raises(bench_gpu.RowFailed, match="--row-seconds"):
        bench_gpu.run_row(Silent(), "smoke", False, options)  # type: ignore[arg-type]


def test_figures_are_compared_in_the_direction_that_is_better() -> None:
    up = {"metric": "x", "better": "higher", "vllm": 100, "must": 120}
    down = {"metric": "x", "better": "lower", "vllm": 10, "must": 8}
    assert bench_gpu.compared(up, {"x": 130})["ratio"] == 1.3 and bench_gpu.compared(up, {"x": 130})["kept"]
    assert not bench_gpu.compared(up, {"x": 119})["kept"]
    assert bench_gpu.compared(down, {"x": 8})["ratio"] == 1.25 and bench_gpu.compared(down, {"x": 8})["kept"]
    assert not bench_gpu.compared(down, {"x": 8.1})["kept"]


def test_every_baseline_is_of_a_row_that_exists() -> None:
    from aiollm.bench.workloads import WORKLOADS

    for shape, rows in bench_gpu.BASELINES["shapes"].items():
        assert shape in shapes.SHAPES and rows.keys() <= {"start", *WORKLOADS}


def test_a_shape_has_a_tokenizer_of_its_size(tmp_path: Path) -> None:
    config = shapes.SHAPES["qwen3-0.6b"] | {"vocab_size": 1000}
    tokenizer = Tokenizer.load(str(shapes.write(tmp_path / "shape", config)))
    assert tokenizer.vocab_size == 1000 and tokenizer.eos_ids == {999}
    assert tokenizer.decode(tokenizer.encode("any text", False)) == "any text"
    assert tokenizer.decode([500, 501]) == " w500 w501"
    assert json.loads((tmp_path / "shape" / "config.json").read_text())["num_hidden_layers"] == 28
