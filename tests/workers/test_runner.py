"""One step by hand against transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import run
from tiny_model import in_fp32, write_tiny_model
from updates import begin

from aiollm.wire.messages import Loading, Update, WorkerSettings
from aiollm.wire.sampling import SamplingParams
from aiollm.workers import runner as runner_module
from aiollm.workers.flight import Outcome
from aiollm.workers.load import load
from aiollm.workers.runner import ModelRunner
from aiollm.workers.step import NO_BIAS, Bias, PromptSlice

PROMPT = [(7 * i + 3) % 97 for i in range(21)]
OTHER = [(5 * i + 1) % 97 for i in range(9)]
ECHO = SamplingParams(temperature=0.0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    return loaded(folder)


def loaded(folder: Path) -> ModelRunner:
    def nobody(message: Loading) -> None:
        pass

    return load(WorkerSettings(folder=str(folder), data_type="fp32", rows=3, slots=64, threads=1), nobody).runner


def logits_of(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What transformers says: [len(tokens), vocabulary]."""
    model = in_fp32(folder)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_prefill_and_decode_draw_what_the_logits_say(folder: Path, runner: ModelRunner) -> None:
    updates = [begin(1, 2, PROMPT, credit=3, first_slot=11), begin(2, 0, OTHER, credit=3, first_slot=40)]
    first = run(runner, [2, 0], [0, 0], [len(PROMPT), len(OTHER)], [0, 1], updates=updates, top_n=3)
    expected = [logits_of(folder, tokens)[-1] for tokens in (PROMPT, OTHER)]
    assert first.tokens.tolist() == [int(logits.argmax()) for logits in expected]
    for at, logits in enumerate(expected):
        logprobs = logits.log_softmax(0)
        assert first.logprobs[at] == pytest.approx(float(logprobs.max()), abs=1e-3)
        assert first.top_ids[at].tolist() == logprobs.topk(3).indices.tolist()
        np.testing.assert_allclose(first.top_logprobs[at], logprobs.topk(3).values, atol=1e-3)
    second = run(runner, [0, 2], [len(OTHER), len(PROMPT)], [1, 1], [0, 1])
    after = [logits_of(folder, [*t, int(d)])[-1] for t, d in zip((OTHER, PROMPT), first.tokens[::-1], strict=True)]
    assert second.tokens.tolist() == [int(logits.argmax()) for logits in after]


def test_a_prompt_in_chunks_beside_a_decoding_row(folder: Path, runner: ModelRunner) -> None:
    drawn = run(runner, [0], [0], [len(OTHER)], [0], updates=[begin(1, 0, OTHER, credit=9)]).tokens[0]
    run(runner, [0, 1], [len(OTHER), 0], [1, 8], [0], updates=[begin(2, 1, PROMPT, first_slot=30)])
    last = run(runner, [0, 1], [len(OTHER) + 1, 8], [1, len(PROMPT) - 8], [0, 1])
    assert runner.state.tokens[0, len(OTHER)] == drawn
    known = [OTHER + runner.state.tokens[0, len(OTHER) : len(OTHER) + 2].tolist(), PROMPT]
    assert last.tokens.tolist() == [int(logits_of(folder, tokens)[-1].argmax()) for tokens in known]


@pytest.mark.parametrize("logit_rows", [1, 4, 256])
def test_prompt_logprobs_are_those_of_log_softmax_in_slices(
    folder: Path, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, logit_rows: int
) -> None:
    """Few logits exist at once, however long the echoed prompt is."""
    monkeypatch.setattr(runner_module, "LOGIT_ROWS", logit_rows)
    seen: list[int] = []
    original = runner.model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return original(hidden)

    monkeypatch.setattr(runner.model, "logits", logits)
    slices = [PromptSlice(1, 1, 0, len(PROMPT) - 1, 1, 2)]
    outcome = run(runner, [1], [0], [len(PROMPT)], [0], updates=[begin(1, 1, PROMPT, sampling=ECHO)], prompts=slices)
    ((own, ranks, ids, values),) = outcome.prompts
    expected = logits_of(folder, PROMPT)[:-1].log_softmax(-1)
    likeliest = expected.topk(2).indices[:, 0]
    assert ((ranks == 1) == (likeliest == torch.tensor(PROMPT[1:])).numpy()).all() and ranks.max() > 10
    np.testing.assert_allclose(own, expected[torch.arange(20), PROMPT[1:]], atol=1e-3)
    np.testing.assert_allclose(values, expected.topk(2).values, atol=1e-3)
    assert ids.tolist() == expected.topk(2).indices.tolist()
    assert max(seen) == min(logit_rows, 20) and sum(seen) == 20 + 1


def test_a_chunk_that_ends_inside_its_prompt_draws_nothing(runner: ModelRunner) -> None:
    outcome = run(runner, [0], [0], [8], [], updates=[begin(1, 0, PROMPT)])
    assert len(outcome.tokens) == len(outcome.logprobs) == len(outcome.top_ids) == 0
    assert runner.state.tokens[0, : len(PROMPT) + 1].tolist() == [*PROMPT, 0]


def test_a_bias_moves_the_choice(folder: Path, runner: ModelRunner) -> None:
    best = logits_of(folder, PROMPT)[-1].topk(2).indices.tolist()
    bias = Bias([0], [best[0]], [float("-inf")])
    assert run(runner, [0], [0], [len(PROMPT)], [0], updates=[begin(1, 0, PROMPT)], bias=bias).tokens.tolist() == [
        best[1]
    ]


def test_a_scaled_bias_adds_its_share_of_a_logits_size(folder: Path, runner: ModelRunner) -> None:
    """Of two rows one has scales, on a negative and on a positive logit; the logprobs stay the model's."""
    updates = [begin(1, 0, OTHER), begin(2, 1, PROMPT, first_slot=30)]

    def drawn(updates: Sequence[Update], bias: Bias) -> Outcome:
        return run(runner, [0, 1], [0, 0], [len(OTHER), len(PROMPT)], [0, 1], updates=updates, bias=bias)

    other, best = drawn(updates, NO_BIAS).tokens.tolist()
    logits = logits_of(folder, PROMPT)[-1]
    low, high = int(logits.argmin()), int(logits.topk(2).indices[1])
    assert logits[low] < 0 < logits[high]
    for id in (low, high):
        missing = float(logits[best] - logits[id])
        needed = missing / abs(float(logits[id]))
        for scale, value, expected in ((0.98, 0.0, best), (1.02, 0.0, id), (0.98, 0.05 * missing, id)):
            outcome = drawn([], Bias([0, 1, 1], [7, id, 8], [0.0, value, 0.0], [0.0, scale * needed, 0.0]))
            assert outcome.tokens.tolist() == [other, expected], (id, scale, value)
            assert outcome.logprobs[1] == pytest.approx(float(logits.log_softmax(0)[expected]), abs=1e-3)


def test_logits_that_are_not_finite_are_reported_and_harm_no_other_row(runner: ModelRunner) -> None:
    updates = [begin(1, 0, PROMPT, credit=2), begin(2, 1, OTHER, first_slot=40, credit=2)]
    run(runner, [0, 1], [0, 0], [len(PROMPT), len(OTHER)], [0, 1], updates=updates)
    clean = run(runner, [0, 1], [len(PROMPT), len(OTHER)], [1, 1], [0, 1])
    runner.kv[0][1][5] = float("nan")  # a value of row 0
    spoiled = run(runner, [0, 1], [len(PROMPT), len(OTHER)], [1, 1], [0, 1])
    assert spoiled.tokens.tolist() == [-1, clean.tokens[1]]


def test_weights_that_are_not_finite_draw_no_token(tmp_path: Path) -> None:
    runner = loaded(write_tiny_model(tmp_path))
    runner.model._head.fill_(float("nan"))  # type: ignore[attr-defined]
    assert run(runner, [0], [0], [len(PROMPT)], [0], updates=[begin(1, 0, PROMPT)]).tokens.tolist() == [-1]
