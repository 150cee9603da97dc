"""From rows and index to what admission needs to know of them."""

from typing import NamedTuple

import numpy as np

from aiollm.engine.admission import Newcomer, View
from aiollm.engine.ledger import Ledger
from aiollm.engine.node import Node
from aiollm.engine.request import Request
from aiollm.engine.rows import Column

PASSING = 4  # part of the pool that is kept free, at most, for what layers with a window keep of a chunk till the next


class Outlook(NamedTuple):
    """The running rows as admission sees them. `rows` are their indices, in the order of the view's columns."""

    view: View
    rows: Column
    pending: int
    """Known tokens that are not computed yet."""
    budget: int
    """Of them, those of one step."""


def look(ledger: Ledger, budget: int) -> Outlook:
    """`budget` prompt tokens are computed in a step, those of the rows that do not decode yet in their order.

    A row that ends frees what it alone holds: its own slots, and the nodes that nobody else pins. Nodes of several
    rows, or of a loan, are counted once and stay.
    """
    table, index, window, slots = ledger.table, ledger.index, ledger.limits.window, ledger.limits.slots
    rows = np.flatnonzero(table.active)
    known, granted, indexed = table.known[rows], table.granted[rows], table.indexed[rows]
    alone = index.alone[rows + 1]
    shared = index.pinned - int(alone.sum())
    begin = np.maximum(indexed, table.low[rows])  # of the slots of windows
    stored = np.maximum(known, granted)
    steps = np.zeros(len(table.active), np.int64)
    pending = 0
    for row in ledger.coming.values():
        pending += len(row.tokens) - row.sent
        steps[row.index] = -(-pending // budget)
    view = View(
        held=known - indexed + window.seen(known - begin) + alone,
        done=known - table.prompt[rows],
        known=known,
        cap=table.cap[rows],
        kind=table.kind[rows],
        certain=table.certain[rows],
        delay=steps[rows],
        shared=shared,
        used=shared + int((stored - indexed + window.seen(stored - begin) + alone).sum()),
        slots=slots - min(window.groups * budget, slots // PASSING),
        window=window,
    )
    return Outlook(view, rows, pending, budget)


def newcomers(
    outlook: Outlook, found: list[tuple[Node, int]], requests: tuple[Request, ...], kind: int
) -> list[Newcomer]:
    """What requests of one prompt would bring, of which the index has `found`: the first computes the rest of it."""
    window = outlook.view.window
    owners, cached, guarded = [], 0, 0
    for node, length in found:
        if node.pins:
            cached += length
        if node.guards:
            guarded += length
        if node.pins == 1 and node.pinned_by:
            slots = length * (window.each if node.guards else 1)
            owners.append((int(np.searchsorted(outlook.rows, node.pinned_by - 1)), slots))
    first, alone = requests[0], len(requests) == 1
    unseen = window.groups * max(0, min(window.reach, first.known) - guarded)  # slots of windows that nobody holds yet
    delay = -(-(outlook.pending + first.known - sum(length for _, length in found)) // outlook.budget)
    return [
        Newcomer(
            held=request.known - cached + unseen if alone else window.each,  # the last token is computed for each
            shared=request.known - cached - 1 + unseen if request is first and not alone else 0,
            done=len(request.output),
            known=request.known,
            cap=request.sampling.max_tokens,
            kind=kind,
            certain=request.certain,
            delay=delay,
            owners=tuple(owners) if request is first else (),
        )
        for request in requests
    ]
