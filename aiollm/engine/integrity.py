"""What must hold of the core between any two calls. Random tests ask after every step, `/health` tests when idle."""

import numpy as np

from aiollm.engine.radix import path
from aiollm.engine.request import State
from aiollm.engine.scheduler import Scheduler


def check(core: Scheduler) -> None:
    """Raises AssertionError unless every slot is exactly one of free, held by a row, or owned by one index node."""
    ledger = core.ledger
    owners = ledger.pool.check().astype(np.int32)
    np.add.at(owners, ledger.index.check(), 1)
    pins: dict[int, int] = {}
    for index, row in ledger.running.items():
        assert ledger.rows[index] is row and row.request.row == index and row.request.state is State.RUNNING
        known, table = row.request.known, ledger.table
        assert table.active[index] and table.generation[index] == row.generation, "a column belongs to another life"
        assert (table.known[index], table.decodes[index]) == (known, row.decodes), "columns are behind"
        assert row.decodes != (index in ledger.coming), "a row that waits for its prompt is unknown"
        assert 0 <= row.indexed <= row.granted <= max(row.room, len(row.tokens))
        assert row.indexed <= row.sent <= len(row.tokens) and row.node.end == row.indexed
        assert row.request.known < row.limit or not row.decodes, "a row outlived its limit"
        np.add.at(owners, row.slots[row.indexed : row.granted], 1)
        held = list(path(row.node))
        slots = [node.slots for node in reversed(held)]
        assert not slots or (np.concatenate(slots) == row.slots[: row.indexed]).all(), "a row lost its prefix"
        for node in held:
            pins[id(node)] = pins.get(id(node), 0) + 1
        for node in held:
            assert node.pins >= pins[id(node)]
    assert (owners == 1).all(), f"slots without one owner: {np.flatnonzero(owners != 1)[:8].tolist()}"
    if not ledger.running and not ledger.loans:
        assert ledger.index.pinned == 0, "nobody runs, yet tokens are pinned"
    assert np.flatnonzero(ledger.table.active).tolist() == sorted(ledger.running), "columns of rows that do not run"
    assert core.waiting.tokens == sum(request.known for request in core.waiting), "waiting tokens are miscounted"
    free = set(ledger.free_rows)
    assert len(free) == len(ledger.free_rows) and free.isdisjoint(ledger.running)
    assert len(free) + len(ledger.running) == core.limits.rows
    assert all(request.state is State.WAITING for request in core.waiting)
