import pytest
from plain_worker import Stand, ask

from aiollm.engine.integrity import check
from aiollm.engine.request import State


@pytest.fixture
def core():
    """Two rows decode, one of them on a shared prefix, and one request waits."""
    stand = Stand(rows=2)
    stand.submit(ask([1, 2, 3, 4], 9), ask([1, 2, 3, 5], 9), ask([7], 3))
    stand.round()
    stand.round()
    assert len(stand.core.ledger.running) == 2 and len(stand.core.waiting) == 1
    return stand.core


def leak(core):
    core.ledger.pool.take(1)


def free_what_a_row_holds(core):
    row = core.ledger.running[0]
    core.ledger.pool.give(row.slots[0, row.granted - 1 : row.granted].copy())


def give_a_slot_to_two_rows(core):
    a, b = core.ledger.running.values()
    a.slots[0, a.granted - 1] = b.slots[0, b.granted - 1]


def lose_a_prefix(core):
    row = core.ledger.running[0]
    row.slots[0, :2] = row.slots[0, 1::-1].copy()


def forget_a_pin(core):
    core.ledger.index.unpin(core.ledger.running[1].node, core.ledger.running[1].holder)


def keep_a_pin(core):
    for row in [*core.ledger.running.values()]:
        core.abort(row.request)
    core.ledger.index.pin(next(iter(core.ledger.index.root("").children.values())))


def go_past_the_limit(core):
    core.ledger.running[0].request.output += [1] * 9


def lose_a_row(core):
    core.ledger.free_rows.append(1)


def run_while_waiting(core):
    core.waiting.head(0.0).state = State.RUNNING


BREAKS = [
    leak, free_what_a_row_holds, give_a_slot_to_two_rows, lose_a_prefix, forget_a_pin, keep_a_pin, go_past_the_limit,
    lose_a_row, run_while_waiting,
]  # fmt: skip


@pytest.mark.parametrize("spoil", BREAKS)
def test_a_core_that_is_broken_is_seen(core, spoil):
    check(core)
    spoil(core)
    with pytest.raises(AssertionError):
        check(core)
