"""What must hold of the core between any two calls. Random tests ask after every step, `/health` tests when idle."""

from math import inf

import numpy as np

from aiollm.engine.node import NO_SLOTS, path, subtree
from aiollm.engine.radix import RadixIndex
from aiollm.engine.request import State
from aiollm.engine.scheduler import Scheduler
from aiollm.wire.columns import Ints
from aiollm.wire.messages import MOST_CREDIT


def check(core: Scheduler) -> None:
    """Raises AssertionError unless every slot is exactly one of free, held by a row, or owned by one index node."""
    ledger = core.ledger
    owners = ledger.pool.check().astype(np.int32)
    np.add.at(owners, check_index(ledger.index), 1)
    pins: dict[int, int] = {}
    guards: dict[int, int] = {}
    for index, row in ledger.running.items():
        assert ledger.rows[index] is row and row.request.row == index and row.request.state is State.RUNNING
        known, table = row.request.known, ledger.table
        assert table.active[index] and table.generation[index] == row.generation, "a column belongs to another life"
        assert (table.known[index], table.decodes[index]) == (known, row.decodes), "columns are behind"
        assert row.decodes != (index in ledger.coming), "a row that waits for its prompt is unknown"
        assert 0 <= row.indexed <= row.granted <= max(row.room, len(row.tokens))
        assert row.indexed <= row.sent <= len(row.tokens) and row.node.end == row.indexed
        assert row.request.known < row.limit or not row.decodes, "a row outlived its limit"
        np.add.at(owners, row.slots[0, row.indexed : row.granted], 1)
        np.add.at(owners, row.slots[1:, max(row.indexed, row.low) : row.granted].ravel(), 1)
        held, low = list(path(row.node)), core.limits.window.low(row.next)
        prefix = ledger.index.slots(row.node, 0)
        assert (prefix[0] == row.slots[0, : row.indexed]).all(), "a row lost its prefix"
        assert (prefix[1:, low:] == row.slots[1:, low : row.indexed]).all(), "a row lost what its windows show"
        assert row.granted - row.next <= MOST_CREDIT, "more is granted than a worker has room for"
        assert row.low <= low or not core.limits.window.groups, "slots went back that windows show"
        for node in held:
            assert node.end <= low or node.start >= row.kept, "what windows show is not guarded"
        for node in held:
            pins[id(node)] = pins.get(id(node), 0) + 1
            guards[id(node)] = guards.get(id(node), 0) + (node.start >= row.kept)
        for node in held:
            assert node.pins >= pins[id(node)] and node.guards >= guards[id(node)]
    assert (owners == 1).all(), f"slots without one owner: {np.flatnonzero(owners != 1)[:8].tolist()}"
    if not ledger.running and not ledger.loans:
        assert ledger.index.pinned == 0, "nobody runs, yet tokens are pinned"
    assert np.flatnonzero(ledger.table.active).tolist() == sorted(ledger.running), "columns of rows that do not run"
    assert core.waiting.tokens == sum(request.known for request in core.waiting), "waiting tokens are miscounted"
    free = set(ledger.free_rows)
    assert len(free) == len(ledger.free_rows) and free.isdisjoint(ledger.running)
    assert len(free) + len(ledger.running) == core.limits.rows
    assert all(request.state is State.WAITING for request in core.waiting)


def check_index(index: RadixIndex) -> Ints:
    """All slots held, after checking the tree and its counts; raises AssertionError."""
    windowed = index.windowed
    slots, pinned, nodes = [NO_SLOTS], 0, 0
    alone = np.zeros_like(index.alone)
    kept = dict.fromkeys(index.queues.parts.values(), 0)
    for root in index.roots.values():
        for node in subtree(root):
            assert node.part is root.part, "a node counts for another part"
            assert len(node.keys) == len(node.slots)
            for first, child in node.children.items():
                assert first == int(child.keys[0]) and child.parent is node, "a child is misfiled"
                assert child.end == node.end + len(child.keys), "a depth is wrong"
                assert child.pins <= node.pins or node is root, "a path is pinned in part"
            if node is not root:
                assert len(node.keys), "an empty node"
                assert node.queued or node.pins or node.children, "a leaf cannot be evicted"
                held = len(node.keys) * (1 + windowed if node.guards else 1)
                assert 0 <= node.guards <= node.pins, "guards without pins"
                nodes += 1
                pinned += held if node.pins else 0
                kept[node.part] += len(node.keys) - (held if node.pins else 0)
                if node.pins == 1:
                    alone[node.pinned_by] += held
                slots.append(node.slots)
                if node.windows is not None:
                    kept[node.part] += node.windows.size
                    assert node.windows.shape == (windowed, len(node.keys))
                    assert node.listed >= 0 or node.guards, "windows cannot be lost"
                    slots.append(node.windows.ravel())
                else:
                    assert not (node.guards and windowed), "windows were lost under a guard"
    held_in_all = np.concatenate(slots)
    assert (len(held_in_all), pinned, nodes) == (index.total, index.pinned, index.nodes), "counts are wrong"
    assert (alone == index.alone).all(), "who pins what alone is wrong"
    assert kept == {part: part.kept for part in kept} and sum(kept.values()) == index.evictable, "parts are wrong"
    for part in kept:
        assert all(node.part is part for *_, node in part.heap), "an entry stands in the queue of another part"
        if index.queues.several:
            assert index.queues.oldest.noted.get(part, inf) <= part.oldest, "a part comes too late by age"
            assert index.queues.fullest.noted.get(part, inf) <= part.room, "a part comes too late by what it keeps"
    return held_in_all
