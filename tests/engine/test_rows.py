import numpy as np
from plain_worker import ask

from aiollm.engine.radix import RadixIndex
from aiollm.engine.rows import Row, Table


def row_of(prompt, max_tokens):
    return Row(Table(3, 16), 2, 7, ask(prompt, max_tokens), RadixIndex().root(""))


def test_slots_are_put_behind_those_that_are_there():
    row = row_of([1, 2, 3], 4)
    assert row.put(np.array([[5, 6]], np.int32)) == 0
    assert row.put(np.array([[9]], np.int32)) == 2
    assert row.slots[0, : row.granted].tolist() == [5, 6, 9]


def test_several_rows_are_given_slots_at_once():
    table = Table(4, 8)
    rows = [Row(table, at, 1, ask([1], 5), RadixIndex().root("")) for at in range(4)]
    rows[2].put(np.array([[9]], np.int32))
    starts = table.put(np.array([1, 2, 3]), np.array([2, 1, 3]), np.array([[4, 5, 6, 7, 8, 3]], np.int32))
    assert starts.tolist() == [0, 1, 0]
    assert [row.slots[0, : row.granted].tolist() for row in rows] == [[], [4, 5], [9, 6], [7, 8, 3]]


def test_the_last_token_needs_no_slot():
    row = row_of([1, 2, 3], 4)
    assert (row.limit, row.room) == (7, 6)


def test_a_row_decodes_once_all_it_knew_was_sent():
    row = row_of([1, 2, 3], 4)
    assert not row.decodes
    row.sent = 3
    assert row.decodes
    row.request.output.append(9)
    assert row.decodes, "what is drawn later was never sent"


def test_what_may_stay_ends_before_the_last_known_token():
    row = row_of([1, 2, 3], 4)
    row.sent = row.table.granted[2] = 3
    assert row.stored == 0, "a chunk outside the index may still fail"
    row.indexed = 2
    assert row.stored == 2
    row.request.output.append(9)
    assert row.stored == 3
    row.request.output.append(9)
    assert row.stored == 4


def test_a_resumed_row_knows_its_output():
    request = ask([1, 2, 3], 4)
    request.output += [5]
    row = Row(Table(1, 16), 0, 1, request, RadixIndex().root(""))
    assert row.tokens.tolist() == [1, 2, 3, 5] and row.limit == 7
    assert row.stored == 0, "nothing was drawn in this life"
