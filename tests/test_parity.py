"""Greedy tokens and logprobs equal transformers' in every mode of serving: a short form of `make parity`."""

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
