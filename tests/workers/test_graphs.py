"""Steps through graphs draw what steps without them draw. A graph here is its work, called again on the same memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import run
from tiny_model import in_fp32, write_tiny_model
from updates import begin

from aiollm.kernels.ops import reference_ops
from aiollm.kernels.tolerance import assert_close
from aiollm.wire.messages import Loading, WorkerSettings
from aiollm.wire.sampling import SamplingParams
from aiollm.workers.flight import Outcome
from aiollm.workers.graphs import BIASED
from aiollm.workers.load import load
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import TOP, Draw, Forward, early, sizes
from aiollm.workers.step import Bias, Embed, PromptSlice, Room

ROWS, BUDGET, SLOTS = 6, 40, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def again(work: Callable[[], Any]) -> Callable[[], Any]:
    return work


def loaded(folder: Path) -> ModelRunner:
    def nobody(message: Loading) -> None:
        pass

    settings = WorkerSettings(
        folder=str(folder), data_type="fp32", rows=ROWS, slots=SLOTS, threads=1, max_length=60, chunk_budget=BUDGET
    )
    runner = load(settings, nobody).runner
    runner.model._ops = runner.ops = reference_ops()  # type: ignore[attr-defined]
    return runner


def capturing(folder: Path, some: bool = False) -> ModelRunner:
    runner = loaded(folder)
    every = sizes(ROWS, BUDGET)
    runner.graphs.begin(again, every)
    with torch.inference_mode():
        for size in early(every) if some else every:
            runner.graphs.capture(size)
    return runner


def story(runner: ModelRunner, seed: int) -> list[Outcome]:
    """Random steps of rows that begin, are computed in chunks, and decode with everything that can be asked for."""
    random = np.random.default_rng(seed)
    lengths = {row: int(random.integers(2, 30)) for row in range(ROWS)}
    done = dict.fromkeys(lengths, 0)
    found, number, fresh = [], 0, list(lengths)
    for _ in range(30):
        updates = []
        if fresh and random.random() < 0.5:
            row = fresh.pop()
            number += 1
            params = SamplingParams(
                temperature=float(random.choice([0.0, 1.0])), seed=row, top_p=0.9, presence_penalty=0.5,
                repetition_penalty=1.1,
            )  # fmt: skip
            tokens = random.integers(0, 97, lengths[row]).tolist()
            first = row * 33
            updates.append(begin(number, row, tokens, first_slot=first, credit=33 - len(tokens), sampling=params))
        steps = [
            (row, start, int(min(random.integers(1, 12), lengths[row] - start)) if start < lengths[row] else 1)
            for row, start in done.items()
            if row not in fresh and start < 32
        ]
        if not steps:
            continue
        steps.sort(key=lambda step: step[1] < lengths[step[0]])
        rows, starts, counts = zip(*steps, strict=True)
        sampled = [i for i, (row, start, count) in enumerate(steps) if start + count >= lengths[row]]
        top_n = int(random.choice([0, 0, 3, TOP]))
        biased = len(sampled) if random.random() < 0.4 else 0
        scales = [0.5] * biased if random.random() < 0.5 else []
        bias = Bias(list(range(biased)), [5] * biased, [2.0] * biased, scales)
        found.append(run(runner, rows, starts, counts, sampled, updates=updates, top_n=top_n, bias=bias))
        for row, _, count in steps:
            done[row] += count
    return found


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_steps_draw_the_same_with_graphs_and_without(folder: Path, seed: int, some: bool) -> None:
    ours, theirs = capturing(folder, some), loaded(folder)
    for with_graphs, without in zip(story(ours, seed), story(theirs, seed), strict=True):
        assert with_graphs.tokens.tolist() == without.tokens.tolist()
        assert_close(*map(torch.from_numpy, (with_graphs.logprobs, without.logprobs)))
        assert with_graphs.top_ids.tolist() == without.top_ids.tolist()
        assert_close(*map(torch.from_numpy, (with_graphs.top_logprobs, without.top_logprobs)))
    assert torch.equal(ours.state.tokens[:ROWS], theirs.state.tokens[:ROWS])
    for (k, v), (other_k, other_v) in zip(ours.kv, theirs.kv, strict=True):
        torch.testing.assert_close(k[:-1], other_k[:-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v[:-1], other_v[:-1], atol=1e-5, rtol=1e-5)


def test_every_step_of_a_served_size_finds_a_graph(folder: Path) -> None:
    graphs = capturing(folder, some=True).graphs
    for rows in range(1, ROWS + 1):
        room = graphs.room(Room(rows, rows, rows), False, 0)
        assert room.sequences == room.tokens >= rows and room.sampled >= rows
        assert Forward(False, room.tokens, room.sequences) in graphs._replays
    for tokens in range(2, ROWS + BUDGET + 1):
        room = graphs.room(Room(1, tokens, 0), True, 0)
        assert room.tokens >= tokens and room.sampled == 0
        assert Forward(True, room.tokens, room.sequences) in graphs._replays


def test_a_prompts_logprobs_come_from_a_graphs_hidden_states(folder: Path) -> None:
    prompt = list(range(3, 24))
    slices = [PromptSlice(1, 1, 0, len(prompt) - 1, 1, 2)]
    echo = [
        run(runner, [1], [0], [len(prompt)], [0], updates=[begin(1, 1, prompt)], prompts=slices).prompts[0]
        for runner in (capturing(folder), loaded(folder))
    ]
    for ours, theirs in zip(*echo, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_hidden_states_come_from_a_graphs_too(folder: Path) -> None:
    """Of the last tokens of a prompt and of a row that decodes, in steps that are padded."""
    prompt, other = list(range(3, 24)), list(range(40, 45))
    found = []
    for runner in (capturing(folder), loaded(folder)):
        run(runner, [2], [0], [5], [0], updates=[begin(1, 2, other, first_slot=60, credit=3)])
        update, embeds = begin(2, 1, prompt), [Embed(1, len(prompt)), Embed(0, 0)]
        found.append(run(runner, [2, 1], [5, 0], [1, len(prompt)], [0, 1], updates=[update], embeds=embeds).hidden)
    np.testing.assert_allclose(*found, atol=1e-5)
    assert found[0].shape == (2, 48) and found[0].dtype == np.float32
    expected = in_fp32(folder).model(torch.tensor([prompt])).last_hidden_state[0, -1]
    np.testing.assert_allclose(found[0][0], expected.detach(), atol=1e-4)


def test_more_bias_than_there_is_room_for_is_drawn_without_a_graph(folder: Path) -> None:
    entries = BIASED * ROWS + 1
    bias = Bias([0] * entries, [i % 97 for i in range(entries)], [0.01] * (entries - 1) + [100.0])
    outcome = run(capturing(folder), [0], [0], [3], [0], updates=[begin(1, 0, [1, 2, 3])], bias=bias)
    assert outcome.tokens.tolist() == [(entries - 1) % 97]


def test_nothing_of_a_capture_reaches_a_row(folder: Path) -> None:
    """A size is captured between two steps of a row, whose columns still lie there."""
    runner, plain = loaded(folder), loaded(folder)
    with torch.inference_mode():
        runner.graphs.begin(again, sizes(ROWS, BUDGET))
        begun = [run(r, [2], [0], [4], [0], updates=[begin(1, 2, [9, 8, 7, 6], credit=4)]) for r in (runner, plain)]
        while runner.prepares:
            runner.prepare()
            assert torch.equal(runner.state.tokens[:ROWS], plain.state.tokens[:ROWS])
    assert len(runner.graphs) == len(sizes(ROWS, BUDGET))
    assert begun[0].tokens == begun[1].tokens
    assert run(runner, [2], [4], [1], [0]).tokens == run(plain, [2], [4], [1], [0]).tokens


def test_a_size_that_cannot_be_captured_leaves_steps_as_they_were(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(work: Callable[[], Any]) -> Callable[[], Any]:
        raise MemoryError("no room")

    runner = loaded(folder)
    with torch.inference_mode():
        runner.graphs.begin(full, sizes(ROWS, BUDGET))
        runner.prepare()
    assert not runner.prepares
    assert "cannot be captured" in caplog.text and not runner.graphs.pending
    assert len(run(runner, [2], [0], [4], [0], updates=[begin(1, 2, [9, 8, 7, 6])]).tokens) == 1


def test_without_graphs_a_step_has_room_for_itself(folder: Path) -> None:
    assert loaded(folder).room(Room(3, 17, 2), True, 5) == Room(3, 17, 2)


def test_alternatives_take_the_graph_that_has_them(folder: Path) -> None:
    graphs = capturing(folder).graphs
    assert graphs._draw(3, 0) == Draw(0, 4) and graphs._draw(3, 1) == Draw(TOP, 4)
    assert graphs._draw(3, TOP + 1) is None and graphs._draw(0, 0) is None and graphs._draw(ROWS + 1, 0) is None
