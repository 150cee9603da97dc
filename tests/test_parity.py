"""Greedy tokens and logprobs equal transformers' in every mode of serving: a short form of `make parity`."""

import json
from pathlib import Path

import parity
import pytest

from aiollm.hub.resolve import resolve

MODES = ("alone", "batched", "prefix hits", "streamed", "echo", "chunks of 7", "chunks of 64", "paused and resumed",
         "worker killed", "tp 3")  # fmt: skip


@pytest.fixture(scope="module")
def verdicts() -> dict[str, parity.Verdict]:
    folder = resolve(None, progress=lambda phase, fraction: None).folder
    chosen = [mode for mode in parity.MODES if mode != "policies"]  # minutes; `make parity` has them
    return dict(parity.Parity(folder, count=8, longest=200, steps=24).modes(3, chosen))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_logprobs_are_those_of_transformers(verdicts: dict[str, parity.Verdict], mode: str) -> None:
    verdict = verdicts[mode]
    assert verdict.wrong == []
    assert verdict.compared > 100


def test_no_mode_is_left_out(verdicts: dict[str, parity.Verdict]) -> None:
    assert sorted(verdicts) == sorted(MODES)


def test_a_run_of_some_modes_keeps_the_others_of_the_same_prompts_and_software(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    assert parity.joined({"torch": "1", "modes": {"a": 1}, "date": "x"}, path)["modes"] == {"a": 1}
    path.write_text(json.dumps({"torch": "1", "modes": {"a": 1, "b": 1}, "date": "x"}))
    assert parity.joined({"torch": "1", "modes": {"a": 2}, "date": "y"}, path)["modes"] == {"a": 2, "b": 1}
    assert parity.joined({"torch": "2", "modes": {"a": 2}, "date": "y"}, path)["modes"] == {"a": 2}
