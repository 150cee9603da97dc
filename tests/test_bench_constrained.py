"""tools/bench_constrained.py on a CPU, with a model that is tiny."""

import json
import sys
from pathlib import Path

import bench_constrained
import pytest
from test_bench_shapes import FLAGS, TINY
from tiny_tokenizer import write_byte_tokenizer

from aiollm.text.tokenizer import Tokenizer

SIZE = 1000


def test_a_model_takes_the_tokenizer_of_another_one_and_its_end(tmp_path: Path) -> None:
    model = bench_constrained.write(tmp_path / "model", {"vocab_size": SIZE})
    other = tmp_path / "other"
    other.mkdir()
    write_byte_tokenizer(other)
    bench_constrained.take_tokenizer(other, model)
    taken, source = Tokenizer.load(str(model)), Tokenizer.load(str(other))
    config = json.loads((model / "config.json").read_text())
    assert config["vocab_size"] == SIZE and taken.eos_ids == {config["eos_token_id"]} == source.eos_ids
    assert taken.encode("Why?", False) == source.encode("Why?", False)


@pytest.mark.long
def test_waves_are_measured_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_constrained, "SHAPES", {"tiny": TINY})
    saved = tmp_path / "found.json"
    options = ["--shape", "tiny", "--rows", "1", "--tokens", "8", "--token-ids", "0:200", "--save", str(saved)]
    monkeypatch.setattr(sys, "argv", ["bench_constrained.py", *options, "--", *FLAGS])
    assert bench_constrained.main() == 0
    free, constrained = json.loads(saved.read_text())["waves"]
    assert (free["free"], free["constrained"]) == (1, 0) and (constrained["free"], constrained["constrained"]) == (0, 1)
    for wave, kind in ((free, "free"), (constrained, "constrained")):
        assert wave["figures"][kind]["total_output_tokens"] == 8 and wave["figures"][kind]["mean_tpot_ms"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 4
