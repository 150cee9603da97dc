import numpy as np
from plain_worker import ask

from aiollm.engine.radix import RadixIndex
from aiollm.engine.rows import Row


def row_of(prompt, max_tokens):
    return Row(2, 7, ask(prompt, max_tokens), RadixIndex().root(""))


def test_slots_are_put_behind_those_that_are_there():
    row = row_of([1, 2, 3], 4)
    assert row.put(np.array([5, 6], np.int32)) == 0
    assert row.put(np.array([9], np.int32)) == 2
    assert row.slots[: row.granted].tolist() == [5, 6, 9]


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
    row.sent = row.granted = 3
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
    row = Row(0, 1, request, RadixIndex().root(""))
    assert row.tokens.tolist() == [1, 2, 3, 5] and row.limit == 7
    assert row.stored == 0, "nothing was drawn in this life"
