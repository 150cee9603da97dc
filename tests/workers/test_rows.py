from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from updates import begin, run_of

from aiollm.wire.columns import pack
from aiollm.wire.messages import Update
from aiollm.wire.sampling import AllowedIds, Constraint, Decay, FirstIds, Healing, SamplingParams
from aiollm.workers.rows import FEW, Rows


def launched(rows: Rows, row: int, end: int) -> None:
    rows.launched(np.array([row]), np.array([end]))


def test_a_row_decodes_once_its_prompt_is_launched_and_as_far_as_its_credit() -> None:
    rows = Rows(3)
    rows.apply(begin(1, 1, [5, 6, 7], credit=2, outputs=9))
    assert [r.tolist() for r in rows.runnable()] == [[], []]
    launched(rows, 1, 3)
    assert [r.tolist() for r in rows.runnable()] == [[1], []]
    launched(rows, 1, 5)
    assert [r.tolist() for r in rows.runnable()] == [[], [1]], "stalled for want of credit"
    rows.apply(Update(number=2, slots=run_of(1, 5, [9])))
    assert [r.tolist() for r in rows.runnable()] == [[1], []]


def test_a_row_is_not_launched_past_its_limit() -> None:
    rows = Rows(1)
    rows.apply(begin(1, 0, [5, 6], credit=8, outputs=2))
    launched(rows, 0, 2)
    assert rows.runnable()[0].tolist() == [0]
    launched(rows, 0, 3)  # draws the token at position 3, which is the last
    assert [r.tolist() for r in rows.runnable()] == [[], []]


def test_a_row_may_be_retired_and_admitted_in_one_update() -> None:
    rows = Rows(1)
    rows.apply(begin(1, 0, [5, 6], credit=1))
    launched(rows, 0, 2)
    rows.idle[0] = True
    rows.apply(begin(2, 0, [8], generation=2, retire=[0]))
    assert rows.alive(np.array([0, 0]), np.array([1, 2])).tolist() == [False, True]
    assert (rows.position[0], rows.granted[0], rows.known[0]) == (0, 1, 1)
    assert not rows.decoding[0]


def test_a_running_row_cannot_be_admitted() -> None:
    rows = Rows(1)
    rows.apply(begin(1, 0, [5]))
    with pytest.raises(ValueError, match="row 0 was admitted while it was running"):
        rows.apply(begin(2, 0, [6], generation=2))


@pytest.mark.parametrize("start", [0, 1, 3])
def test_slots_that_repeat_or_skip_a_position_are_refused(start: int) -> None:
    rows = Rows(1)
    rows.apply(begin(1, 0, [5, 6]))
    with pytest.raises(ValueError, match=f"slots of row 0 arrived for position {start}, not 2"):
        rows.apply(Update(number=2, slots=run_of(0, start, [9])))


def test_slots_of_a_retired_row_are_refused() -> None:
    rows = Rows(1)
    rows.apply(begin(1, 0, [5, 6]))
    with pytest.raises(ValueError, match="slots of row 0"):
        rows.apply(Update(number=2, retire=pack([0]), slots=run_of(0, 2, [9])))


def test_stop_ids_are_masked_until_min_tokens_are_drawn() -> None:
    sampling = SamplingParams(min_tokens=2, stop_ids=(3, 4), logit_bias={7: -1.0})
    rows = Rows(2)
    rows.apply(begin(1, 1, [5, 6], credit=9, outputs=9, sampling=sampling))
    seen = []
    for end in (2, 3, 4):  # the first, second and third token are drawn behind these
        launched(rows, 1, end)
        bias = rows.bias(np.array([1]))
        assert bias.at == [0] * len(bias.ids)
        seen.append(dict(zip(bias.ids, bias.values, strict=True)))
    masked = {7: -1.0, 3: float("-inf"), 4: float("-inf")}
    assert seen == [masked, masked, {7: -1.0}]


def decays(decay: Decay, generated: Sequence[int], **more: Any) -> list[dict[int, float]]:
    """The scales by id, after so many generated tokens each."""
    rows = Rows(1)
    rows.apply(begin(1, 0, [5, 6], credit=9, outputs=9000, sampling=SamplingParams(decay=decay, **more)))
    seen = []
    for count in generated:
        launched(rows, 0, 2 + count)
        bias = rows.bias(np.array([0]))
        seen.append({id: scale for id, scale in zip(bias.ids, bias.scales, strict=True) if scale})
    return seen


def test_a_decay_grows_with_the_tokens_beyond_its_start() -> None:
    powers = [0.0, 0.0, 0.0, 1.5 - 1, 1.5**2 - 1, 1.5**3 - 1]
    expected = [{3: pytest.approx(p), 8: pytest.approx(p)} if p else {} for p in powers]
    assert decays(Decay(2, 1.5, (3, 8)), range(6)) == expected
    assert decays(Decay(0, 1.0, (3,)), [0, 100]) == [{}, {}], "a factor of 1 changes nothing"
    (last,) = decays(Decay(0, 1e300, (3,)), [8000])
    assert 1e6 < last[3] < 1e30, "a logit stays finite"


def test_a_decay_waits_for_min_tokens() -> None:
    assert decays(Decay(0, 2.0, (3,)), [1, 2], min_tokens=2, stop_ids=(3,)) == [{}, {3: pytest.approx(3.0)}]


@pytest.mark.parametrize(
    ("own", "masked"),
    [
        ((), [False] * 5),
        ((FirstIds((3,)),), [True, False, False, False, False]),
        ((Healing(b"abc"),), [True, True, True, False, False]),
        ((FirstIds((3,)), AllowedIds((3, 4))), [True] * 5),
    ],
)
def test_a_row_is_masked_as_far_as_its_constraints_reach(own: tuple[Constraint, ...], masked: list[bool]) -> None:
    """Where no mask holds stop ids back until min_tokens, a bias does."""
    rows = Rows(1)
    sampling = SamplingParams(constraints=own, min_tokens=4, stop_ids=(9,))
    rows.apply(begin(1, 0, [5, 6], credit=9, outputs=9, sampling=sampling))
    seen, held = [], []
    for count in range(5):
        launched(rows, 0, 2 + count)
        seen.append(bool(rows.masked(np.array([0]))[0]))
        held.append(rows.bias(np.array([0])).ids == [9])
    assert seen == masked
    assert held == [not under and count < 4 for count, under in enumerate(masked)]


@pytest.mark.parametrize("count", [0, 1, FEW, FEW + 1, 40])
def test_a_row_stops_at_each_of_its_stop_ids_and_where_nothing_could_be_drawn(count: int) -> None:
    rows = Rows(3)
    stops = tuple(range(100, 100 + count))
    rows.apply(begin(1, 2, [5, 6], sampling=SamplingParams(stop_ids=stops)))
    rows.apply(begin(2, 0, [5, 6], first_slot=9, sampling=SamplingParams(stop_ids=(7,))))
    who, drawn = np.array([2, 0, 2, 2, 2]), np.array([stops[-1] if stops else 1, 7, 7, -1, 99])
    assert rows.stopped(who, drawn).tolist() == [bool(stops), True, False, True, False]
