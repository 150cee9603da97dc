import numpy as np
import pytest
import torch
from updates import begin

from aiollm.workers import uploads
from aiollm.workers.arrivals import Arrivals
from aiollm.workers.staging import Staging
from aiollm.workers.step import NO_BIAS, Room, columns

CPU = torch.device("cpu")
MOST = Room(4, 12, 4)
STEP = tuple(np.array(column) for column in ([2, 0], [7, 0], [1, 3], [0, 1]))


def test_columns_are_found_again_by_their_room() -> None:
    """A graph that was captured before sees what comes later."""
    arrivals, room = Arrivals(MOST, CPU), Room(4, 8, 3)
    before = arrivals.columns(room)
    given = columns(*STEP, NO_BIAS, room, 9)
    rest = arrivals.take(Staging().put(given | uploads.columns([begin(1, 0, [5, 6, 7])], NO_BIAS)), room)
    assert {name: column.tolist() for name, column in before.items()} == {n: c.tolist() for n, c in given.items()}
    assert rest["tokens.0.values"].tolist() == [5, 6, 7] and rest["tokens.0.positions"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("computed", [Room(2, 4, 1), Room(4, 12, 1)])
@pytest.mark.parametrize("sampled", [2, 4])
def test_what_is_computed_and_what_is_drawn_have_sizes_of_their_own(computed: Room, sampled: int) -> None:
    arrivals = Arrivals(MOST, CPU)
    forward, draw = arrivals.columns(computed), arrivals.columns(Room(0, 0, sampled))
    room = computed._replace(sampled=sampled)
    arrivals.take(Staging().put(columns(*STEP, NO_BIAS, room, 9)), room)
    assert forward["token_rows"].tolist() == [2, 0, 0, 0] + [9] * (computed.tokens - 4)
    assert draw["sampled_rows"].tolist() == [2, 0] + [9] * (sampled - 2)


def test_padding_is_nobodys() -> None:
    arrivals, room = Arrivals(MOST, CPU), Room(2, 4, 2)
    arrivals.take(Staging().put(columns(*STEP, NO_BIAS, room, 9)), room)
    assert {name: column.tolist() for name, column in arrivals.pad(room, 9).items()} == {
        "last": [0, 0], "sampled_rows": [9, 9], "sampled_lengths": [0, 0], "bias_starts": [0, 0, 0], "rows": [9, 9],
        "starts": [0, 0, 0], "lengths": [0, 0], "token_rows": [9] * 4, "positions": [0] * 4,
    }  # fmt: skip


@pytest.mark.parametrize("room", [Room(4, 13, 4), Room(4, 12, 5)])
def test_a_step_that_is_too_large_is_refused(room: Room) -> None:
    staged = Staging().put(columns(*STEP, NO_BIAS, room, 9))
    with pytest.raises(ValueError, match="larger than any that was announced"):
        Arrivals(MOST, CPU).take(staged, room)
