from collections.abc import Sequence

import numpy as np
import pytest
import torch
from updates import begin, run_of

from aiollm.kernels.ops import reference_ops
from aiollm.wire.columns import Runs, pack
from aiollm.wire.messages import Admit, Update
from aiollm.wire.sampling import SamplingParams
from aiollm.workers import uploads
from aiollm.workers.staging import Column
from aiollm.workers.state import State
from aiollm.workers.step import NO_BIAS, Room, columns
from aiollm.workers.uploads import FLOATS
from aiollm.workers.windows import Windows

CPU = torch.device("cpu")


def upload(state: State, updates: Sequence[Update]) -> None:
    """As a step brings them."""
    state.upload(len(updates), on_device(uploads.columns(updates, NO_BIAS)))


def on_device(columns: dict[str, Column]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}


def columns_of(row: int, start: int = 0, count: int = 1) -> dict[str, torch.Tensor]:
    """Those of a step that computes tokens of one row, and draws its next one."""
    given = [np.array([value]) for value in (row, start, count, 0)]
    return on_device(columns(*given, NO_BIAS, Room(1, count, 1), 99))


def test_a_row_that_lived_twice_between_two_launches_has_its_last_life() -> None:
    state = State(2, 8, CPU)
    old, new = SamplingParams(temperature=0.5, seed=1, top_k=3), SamplingParams(temperature=2.0, seed=2)
    first = begin(1, 1, [10, 11, 12], first_slot=20, sampling=old)
    upload(state, [first, begin(2, 1, [30, 31], first_slot=40, generation=2, retire=[1], sampling=new)])
    assert state.tokens[1, :3].tolist() == [30, 31, 12]
    assert state.slot_table[1, :3].tolist() == [40, 41, 22]
    assert state.floats[FLOATS.index("temperature"), 1] == 2.0
    assert (state.seeds[1], state.top_k[1], state.prompt_lengths[1]) == (2, 0, 2)


def test_runs_of_several_rows_lie_where_they_say() -> None:
    state = State(3, 8, CPU)
    runs = Runs(pack([2, 0, 2]), pack([0, 3, 5]), pack([2, 1, 3]), pack([1, 2, 3, 4, 5, 6]))
    upload(state, [Update(number=1, slots=runs)])
    assert state.slot_table.tolist()[:3] == [[0, 0, 0, 3, 0, 0, 0, 0], [0] * 8, [1, 2, 0, 0, 0, 4, 5, 6]]
    assert not state.tokens.any()


def test_each_group_of_layers_has_slots_of_its_own() -> None:
    state = State(2, 4, CPU, Windows(1, 2, 2, 4, CPU))
    state.pad_into(77)
    runs = Runs(pack([1, 0]), pack([1, 0]), pack([2, 1]), pack([5, 6, 7, 15, 16, 17]))
    upload(state, [Update(number=1, slots=runs)])
    assert state.slot_table.tolist() == [[7, 0, 0, 0], [0, 5, 6, 0], [77] * 4]
    assert state.windows.tables.tolist() == [[[17, 0, 0, 0], [0, 15, 16, 0], [77] * 4]]
    _, batch = state.batch(columns_of(1, 1, 2), 2, 3, reference_ops())
    (windowed,) = batch.windowed
    assert (batch.slots.tolist(), windowed.slots.tolist()) == ([5, 6], [15, 16])
    assert state.nbytes == 3 * (4 + 4 + 16) * 4, "lines of tokens are aligned"


def test_each_sampling_parameter_reaches_its_column() -> None:
    state = State(2, 8, CPU)
    params = SamplingParams(
        temperature=0.25, top_p=0.5, min_p=0.125, presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.25,
        top_k=7, seed=2**63 - 1,
    )  # fmt: skip
    upload(state, [Update(number=1, admit=[Admit(1, 1, 3, 5, 8, params)])])
    s = state.sampling(columns_of(1, start=4), None, 0)
    found = (s.temperature, s.top_p, s.min_p, s.presence, s.frequency, s.repetition)
    assert [table[s.rows].tolist() for table in found] == [[0.25], [0.5], [0.125], [1.5], [-0.5], [1.25]]
    assert [t[s.rows].tolist() for t in (s.top_k, s.seeds, s.prompt_lengths)] == [[7], [2**63 - 1], [3]]
    assert (s.lengths.tolist(), s.mask_lines.tolist()) == ([5], [-1])


@pytest.mark.parametrize(("input_penalty", "length"), [(None, 3), (True, 0), (False, -3)])
def test_a_prompt_counts_for_penalties_as_the_request_says(input_penalty: bool | None, length: int) -> None:
    state = State(2, 8, CPU)
    params = SamplingParams(input_penalty=input_penalty)
    upload(state, [Update(number=1, admit=[Admit(1, 1, 3, 5, 8, params)])])
    assert state.prompt_lengths[1] == length


def test_a_bias_is_what_was_given() -> None:
    state = State(4, 8, CPU)
    bias = torch.tensor([7, 8]), torch.tensor([1.0, -2.0])
    s = state.sampling(columns_of(0), bias, 3)
    assert (s.bias_ids is bias[0], s.bias_values is bias[1], s.top_n) == (True, True, 3)
    none = state.sampling(columns_of(0), None, 0)
    assert (none.bias_starts.tolist(), none.bias_ids.tolist()) == ([0, 0], [])


def test_padding_has_a_row_and_a_slot_of_its_own() -> None:
    state = State(2, 4, CPU)
    state.pad_into(77)
    assert (state.hold, state.slot_table.tolist()) == (2, [[0] * 4, [0] * 4, [77] * 4])


def test_a_batch_names_the_slot_of_each_new_token() -> None:
    state = State(2, 8, CPU)
    upload(state, [begin(1, 1, [10, 11, 12, 13], first_slot=20)])
    ids, batch = state.batch(columns_of(1, start=1, count=2), 2, 3, reference_ops())
    assert ids.tolist() == [11, 12]
    assert batch.slots.tolist() == [21, 22]
    assert (batch.lengths.tolist(), batch.starts.tolist(), batch.max_new, batch.max_length) == ([3], [0, 2], 2, 3)


@pytest.mark.parametrize(("drawn", "kept"), [(7, 7), (-1, 0)])
def test_a_drawn_token_is_the_rows_next_one(drawn: int, kept: int) -> None:
    state = State(2, 8, CPU)
    state.tokens[:] = 5
    state.store(columns_of(1, start=3), torch.tensor([drawn]), reference_ops())
    assert state.tokens[1, :8].tolist() == [5, 5, 5, 5, kept, 5, 5, 5]
    assert (state.tokens[[0, 2]] == 5).all()


@pytest.mark.parametrize("length", [15, 16, 17])
def test_what_a_full_row_draws_lies_in_no_other_row(length: int) -> None:
    state = State(2, length, CPU)
    state.store(columns_of(0, start=length - 1), torch.tensor([7]), reference_ops())
    assert state.tokens[0, length] == 7 and not state.tokens[1:].any()


def test_nothing_changes_where_nothing_was_sent() -> None:
    state = State(1, 4, CPU)
    upload(state, [Update(number=1, tokens=run_of(0, 0, [3, 4]))])
    before = state.tokens.clone()
    upload(state, [])
    upload(state, [Update(number=2, retire=pack([0]))])
    assert torch.equal(state.tokens, before)
