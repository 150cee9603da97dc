import numpy as np

from aiollm.engine.plan import Draft, RunList
from aiollm.wire.columns import Runs, ints
from aiollm.wire.messages import Admit
from aiollm.wire.sampling import SamplingParams


def runs(packed):
    values = iter(ints(packed.values).tolist())
    columns = (ints(column).tolist() for column in (packed.rows, packed.starts, packed.counts))
    return [(row, start, [next(values) for _ in range(count)]) for row, start, count in zip(*columns, strict=True)]


def test_runs_are_packed_in_the_order_they_came():
    drafted = RunList()
    drafted.add(3, 5, np.array([7, 8], np.int32))
    drafted.add(1, 0, np.array([9], np.int64))
    drafted.add(2, 4, np.array([], np.int32))
    assert runs(drafted.packed()) == [(3, 5, [7, 8]), (1, 0, [9])]


def test_the_runs_of_a_paused_row_are_forgotten():
    drafted = RunList()
    for row in (1, 2, 1):
        drafted.add(row, row, np.array([row], np.int32))
    drafted.forget(1)
    assert runs(drafted.packed()) == [(2, 2, [2])]
    drafted.forget(2)
    assert drafted.packed() == Runs()


def test_runs_of_several_tables_come_table_by_table():
    drafted = RunList()
    drafted.add(1, 0, np.array([[1, 2], [11, 12]], np.int32))
    drafted.add(2, 5, np.array([[3], [13]], np.int32))
    drafted.add(1, 2, np.array([[4], [14]], np.int32))
    packed = drafted.packed()
    assert ints(packed.counts).tolist() == [2, 1, 1]
    assert ints(packed.values).tolist() == [1, 2, 3, 4, 11, 12, 13, 14]
    drafted.forget(1)
    assert ints(drafted.packed().values).tolist() == [3, 13]


def test_an_empty_draft_is_false_and_any_field_makes_it_true():
    assert not Draft()
    some = np.array([1], np.int32)
    for fill in (
        lambda draft: draft.retire.append(0),
        lambda draft: draft.admit.append(Admit(0, 1, 1, 1, 2, SamplingParams())),
        lambda draft: draft.slots.add(0, 0, some),
        lambda draft: draft.tokens.add(0, 0, some),
        lambda draft: draft.chunk(0, 0, some),
    ):
        draft = Draft()
        fill(draft)
        assert draft


def test_a_chunk_brings_its_slots():
    draft = Draft()
    draft.retire.append(4)
    draft.chunk(4, 2, np.array([8, 9], np.int32))
    update = draft.packed(6)
    assert update.number == 6 and ints(update.retire).tolist() == [4]
    assert runs(update.slots) == [(4, 2, [8, 9])]
    chunks = (update.chunk_rows, update.chunk_starts, update.chunk_counts)
    assert [ints(column).tolist() for column in chunks] == [[4], [2], [2]]
