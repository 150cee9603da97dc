import numpy as np

from aiollm.workers.staging import TYPES, lay_out
from aiollm.workers.step import NO_BIAS, Bias, Room, columns, computing, drawing

# A decode row at position 7, a chunk [2, 5) that is not the row's last, and a chunk [0, 2) that is.
STEP = tuple(np.array(column) for column in ([4, 1, 0], [7, 2, 0], [1, 3, 2], [0, 2]))


def test_a_steps_columns_stand_sequence_after_sequence() -> None:
    found = columns(*STEP, NO_BIAS, Room(3, 6, 2), 9)
    assert {name: column.tolist() for name, column in found.items()} == {
        "last": [0, 5],
        "sampled_rows": [4, 0],
        "sampled_lengths": [8, 2],
        "bias_starts": [0, 0, 0],
        "rows": [4, 1, 0],
        "starts": [0, 1, 4, 6],
        "lengths": [8, 5, 2],
        "token_rows": [4, 1, 1, 1, 0, 0],
        "positions": [7, 2, 3, 4, 0, 1],
    }


def test_what_there_is_room_for_besides_is_padded_with_the_hold_row() -> None:
    """Sequences without tokens, tokens at the hold row's first position, drawings for it."""
    found = columns(*STEP, Bias([0, 0, 1], [5, 6, 7], [1.0] * 3), Room(5, 8, 4), 9)
    assert {name: column.tolist() for name, column in found.items()} == {
        "last": [0, 5, 0, 0],
        "sampled_rows": [4, 0, 9, 9],
        "sampled_lengths": [8, 2, 0, 0],
        "bias_starts": [0, 2, 3, 3, 3],
        "rows": [4, 1, 0, 9, 9],
        "starts": [0, 1, 4, 6, 6, 6],
        "lengths": [8, 5, 2, 0, 0],
        "token_rows": [4, 1, 1, 1, 0, 0, 9, 9],
        "positions": [7, 2, 3, 4, 0, 1, 0, 0],
    }


def test_columns_lie_where_the_room_alone_says() -> None:
    room = Room(5, 8, 3)
    found = columns(*STEP, NO_BIAS, room, 9)
    staged = lay_out({name: (len(column), TYPES[column.dtype]) for name, column in found.items()})
    begin = max(place.end for place in drawing(room).values())
    behind = {name: place._replace(begin=place.begin + begin) for name, place in computing(room).items()}
    assert staged == drawing(room) | behind
