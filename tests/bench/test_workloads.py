"""Loads are the same each time, and as long as they say."""

import json
import math
import random
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest

from aiollm.bench.workloads import (
    SHARED_TEXTS,
    WORKLOADS,
    Draw,
    LoadError,
    Ramp,
    Turn,
    Workload,
    around,
    fixed,
    jobs,
    read_texts,
    shuffled,
    text_jobs,
    with_output,
)

DRAW = Draw(seed=3, low=10, high=90)


@pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - {"prefill"} - {n for n in WORKLOADS if "k1k" in n}))
def test_a_named_load_is_the_same_each_time(name: str) -> None:
    load = WORKLOADS[name]
    found = jobs(load, DRAW)
    assert found == jobs(load, DRAW) != jobs(load, DRAW._replace(seed=4))
    assert len(found) == load.requests
    assert all(len(job.turns) == 1 and job.turns[0].output >= 1 for job in found)
    assert all(10 <= id < 90 for job in found for id in job.turns[0].prompt)
    times = [job.at for job in found]
    assert times[0] == 0 and times == sorted(times)
    if load.rate is None:
        assert set(times) == {0.0}
    else:
        assert (len(times) - 1) / times[-1] == pytest.approx(load.rate, rel=0.15)


def test_the_lengths_of_conversations_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text("[[3, 4], [5, 6]]")
    found = jobs(Workload(5, 1, None, path), DRAW)
    assert [(len(job.turns[0].prompt), job.turns[0].output) for job in found] == [(3, 4), (5, 6)] * 2 + [(3, 4)]


@pytest.mark.parametrize("content", ["", "{}", "[]", "[[1]]", "[[0, 4]]", '[["a", 1]]'])
def test_a_file_that_holds_no_lengths_is_refused_by_the_flags_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(content)
    with pytest.raises(LoadError, match="--dataset-path"):
        jobs(Workload(5, 1, None, path), DRAW)


def test_lengths_stay_within_their_ratio() -> None:
    draw, r = around(100, 10, 0.2, 0.2), random.Random(0)
    prompts, outputs = zip(*(draw(r) for _ in range(500)), strict=True)
    assert (min(prompts), max(prompts)) == (80, 120)
    assert (min(outputs), max(outputs)) == (8, 12)
    draw = around(100, 10, 0.0, 0.5)
    prompts, outputs = zip(*(draw(r) for _ in range(500)), strict=True)
    assert (set(prompts), min(outputs), max(outputs)) == ({100}, 5, 15)
    assert all(min(around(1, 1, 1.0, 1.0)(r)) >= 1 for _ in range(50)), "no prompt is empty"


def test_arrivals_without_any_burst_are_even() -> None:
    found = jobs(Workload(4, None, 5, fixed(1, 1)), DRAW._replace(burstiness=math.inf))
    assert [job.at for job in found] == pytest.approx([0, 0.2, 0.4, 0.6])


def test_a_seed_draws_the_same_order_each_time() -> None:
    items = [str(at) for at in range(50)]
    assert shuffled(items, 1) == shuffled(items, 1) != shuffled(items, 2)
    assert sorted(shuffled(items, 1)) == sorted(items)


def test_burstier_arrivals_have_the_same_rate() -> None:
    load = Workload(4000, None, 50, fixed(1, 1))
    gaps = {}
    for burstiness in (0.2, 1.0, 5.0):
        times = [job.at for job in jobs(load, DRAW._replace(burstiness=burstiness))]
        assert times[-1] == pytest.approx(80, rel=0.15)
        gaps[burstiness] = max(b - a for a, b in pairwise(times))
    assert gaps[0.2] > gaps[1.0] > gaps[5.0]


@pytest.mark.parametrize(("strategy", "halfway"), [("linear", 12.5), ("exponential", 10.0)])
def test_a_ramp_rises_from_its_start_to_its_end(strategy: str, halfway: float) -> None:
    ramp = Ramp(strategy, 5.0, 20.0)
    assert [ramp.rate(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([5.0, halfway, 20.0])


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
@pytest.mark.parametrize("texts", [False, True])
def test_requests_come_as_often_as_the_ramp_says(strategy: str, texts: bool) -> None:
    ramp = Ramp(strategy, 5.0, 20.0)
    load = Workload(3000, None, None, fixed(1, 1), ramp)
    found = text_jobs([Turn("one", 1)], load, DRAW) if texts else jobs(load, DRAW)
    times = [job.at for job in found]
    for share in (0.0, 0.45, 0.9):
        first = int(share * 2999)
        rate = 300 / (times[first + 299] - times[first])
        assert rate == pytest.approx(ramp.rate(share + 0.05), rel=0.15)


def test_a_ramp_leaves_prompts_as_they_are_without_a_rate_and_one_request_comes_at_once() -> None:
    assert jobs(Workload(1, None, None, fixed(3, 1), Ramp("linear", 1, 2)), DRAW) == jobs(
        Workload(1, None, None, fixed(3, 1)), DRAW
    )


def test_answers_may_all_be_of_one_length() -> None:
    found = jobs(Workload(5, 1, None, around(8, 4, 0.5, 0.5)), DRAW)
    assert with_output(found, None) == found
    changed = with_output(found, 77)
    assert [job.turns[0].output for job in changed] == [77] * 5
    assert [job.turns[0].prompt for job in changed] == [job.turns[0].prompt for job in found]


def test_beginnings_are_taken_in_turn_and_prompts_stay_their_own() -> None:
    plain = jobs(Workload(6, 1, None, fixed(8, 1)), DRAW)
    found = jobs(Workload(6, 1, None, fixed(8, 1)), DRAW._replace(prefix=5, prefixes=2))
    for at, job in enumerate(found):
        assert job.turns[0].prompt[:5] == found[at % 2].turns[0].prompt[:5]
        assert job.turns[0].prompt[5:] == plain[at].turns[0].prompt
    assert found[0].turns[0].prompt[:5] != found[1].turns[0].prompt[:5]


def test_shared_texts_keep_lengths_and_ends() -> None:
    load = Workload(3 * SHARED_TEXTS, 1, None, around(40, 4, 0.5, 0.5))
    plain, found = jobs(load, DRAW), jobs(load, DRAW._replace(shared=0.5))
    for at, (before, after) in enumerate(zip(plain, found, strict=True)):
        own, shared = before.turns[0].prompt, after.turns[0].prompt
        half = len(own) // 2
        assert len(shared) == len(own) and shared[half:] == own[half:]
        other = found[(at + SHARED_TEXTS) % len(found)].turns[0].prompt
        common = min(half, len(other) // 2)
        assert shared[:common] == other[:common]


@pytest.mark.parametrize(
    "draw",
    [DRAW, DRAW._replace(prefix=6, prefixes=3), DRAW._replace(shared=0.5), DRAW._replace(turns=3, burstiness=0.5)],
)
def test_points_differ_in_their_token_ids_alone(draw: Draw) -> None:
    load = Workload(30, None, 50, around(40, 10, 0.5, 0.5))
    prompts = []
    for point in range(3):
        found = jobs(load, draw._replace(point=point))
        prompts.append([turn.prompt for job in found for turn in job.turns])
        assert all(draw.low <= token < draw.high for prompt in prompts[-1] for token in prompt)
        shape = [(job.at, [(len(turn.prompt), turn.output) for turn in job.turns]) for job in found]
        assert shape == [
            (job.at, [(len(turn.prompt), turn.output) for turn in job.turns]) for job in jobs(load, draw)
        ], "loads stay comparable"
        alike = [a[:4] == b[:4] for a, b in product(prompts[-1], repeat=2)]
        assert alike == [a[:4] == b[:4] for a, b in product(prompts[0], repeat=2)], "beginnings are shared as before"
    assert prompts[0] == [turn.prompt for job in jobs(load, draw) for turn in job.turns]
    for one, other in combinations(prompts, 2):
        assert not {tuple(prompt[:4]) for prompt in one} & {tuple(prompt[:4]) for prompt in other}


def test_texts_of_later_points_begin_differently(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n')
    load = Workload(1, 1, None, fixed(1, 1))
    found = [text_jobs(read_texts(path, 9), load, DRAW._replace(point=point))[0].turns[0].prompt for point in range(3)]
    assert found == ["one", "2. one", "3. one"]


def test_conversations_have_as_many_requests_together_as_asked_for() -> None:
    found = jobs(Workload(10, 2, None, fixed(5, 2)), DRAW._replace(turns=4, prefix=3))
    assert [len(job.turns) for job in found] == [4, 4, 2]
    assert [len(turn.prompt) for turn in found[0].turns] == [8, 5, 5, 5], "a later turn brings only what is new"


def test_texts_come_from_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "output_tokens": 7}\n\n{"prompt": "two", "output_tokens": 8}\n')
    for output, first, second in ((None, 7, 8), (9, 9, 9)):
        found = text_jobs(read_texts(path, output), Workload(3, 1, None, fixed(1, 1)), DRAW)
        expected = [("one", first), ("two", second), ("one", first)]
        assert [(job.turns[0].prompt, job.turns[0].output) for job in found] == expected
    path.write_text('{"prompt": "one"}')
    assert read_texts(path, 9) == [Turn("one", 9)]


@pytest.mark.parametrize("output", [None, 9])
@pytest.mark.parametrize("content", ["", "[1]", '{"text": 1}'])
def test_texts_that_cannot_be_read_are_refused_by_the_flags_name(
    tmp_path: Path, content: str, output: int | None
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(LoadError, match="--dataset-path"):
        read_texts(path, output)
    with pytest.raises(LoadError, match="--dataset-path"):
        read_texts(tmp_path / "none", output)


@pytest.mark.parametrize("length", [{}, {"output_tokens": "y"}, {"output_tokens": 0}])
def test_lines_without_a_length_of_their_own_are_refused_where_it_is_asked_for(
    tmp_path: Path, length: dict[str, object]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x"} | length))
    with pytest.raises(LoadError, match=r"--dataset-path: .*output_tokens"):
        read_texts(path, None)
