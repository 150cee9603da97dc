import numpy as np
import torch
from updates import begin

from aiollm.wire.columns import Runs, pack
from aiollm.wire.messages import Admit, Update
from aiollm.wire.sampling import SamplingParams
from aiollm.workers.step import NO_BIAS, Bias
from aiollm.workers.uploads import FLOATS, columns, laid


def test_nothing_comes_of_updates_that_bring_nothing() -> None:
    assert columns([], NO_BIAS) == {}
    assert columns([Update(number=1, retire=pack([3]))], NO_BIAS) == {}


def test_runs_name_the_row_and_position_of_each_value() -> None:
    runs = Runs(pack([2, 0]), pack([4, 1]), pack([3, 1]), pack([7, 8, 9, 5]))
    found = columns([Update(number=1), Update(number=2, tokens=runs)], NO_BIAS)
    assert {name: column.tolist() for name, column in found.items()} == {
        "tokens.1.rows": [2, 2, 2, 0], "tokens.1.positions": [4, 5, 6, 1], "tokens.1.values": [7, 8, 9, 5],
    }  # fmt: skip


def test_later_updates_are_laid_over_earlier_ones() -> None:
    updates = [begin(1, 1, [10, 11, 12]), begin(2, 1, [30, 31], generation=2, retire=[1])]
    found = {name: torch.from_numpy(np.array(column)) for name, column in columns(updates, NO_BIAS).items()}
    table = torch.zeros((2, 4), dtype=torch.int32)
    for rows, positions, values in laid("tokens", 2, found):
        table[rows, positions] = values
    assert table.tolist() == [[0, 0, 0, 0], [30, 31, 12, 0]]


def test_a_row_that_lived_twice_comes_with_its_last_life() -> None:
    lives = [SamplingParams(temperature=t, seed=s, top_k=s) for t, s in ((0.5, 1), (2.0, 2), (1.0, 3))]
    admits = [Admit(row, 1, 3, 3, 8, life) for row, life in zip((4, 4, 0), lives, strict=True)]
    found = columns([Update(number=1, admit=admits[:1]), Update(number=2, admit=admits[1:])], NO_BIAS)
    assert found["admit.rows"].tolist() == [4, 0]
    assert found["admit.floats"].reshape(len(FLOATS), -1)[0].tolist() == [2.0, 1.0]
    assert (found["admit.top_k"].tolist(), found["admit.seeds"].tolist()) == ([2, 3], [2, 3])


def test_a_bias_comes_along() -> None:
    found = columns([], Bias([0, 1], [7, 9], [0.5, -np.inf]))
    assert (found["bias.ids"].tolist(), found["bias.values"].tolist()) == ([7, 9], [0.5, -np.inf])
