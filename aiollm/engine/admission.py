"""How much KV memory a set of rows will need at its worst moment.

The peak formula of the Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150): sort rows by the tokens
they still have to generate; just before row i finishes, rows 1..i are alive and each has grown by b_i.
"""

from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.radix import Node, RadixIndex, path
from aiollm.engine.request import Request
from aiollm.engine.rows import Row

Predict = Callable[[Request], int]
"""The total length that a request is expected to reach."""


def peak(held: NDArray[np.int64], remaining: NDArray[np.int64]) -> int:
    """max_i (i * b_i + sum_{j <= i} a_j), rows sorted by b descending; a = tokens held, b = tokens to come."""
    if not len(held):
        return 0
    order = np.argsort(-remaining, kind="stable")
    alive = np.arange(1, len(held) + 1)
    return int((alive * remaining[order] + np.cumsum(held[order])).max())


class Outlook:
    """What the running rows hold and will come to hold, read once for all requests that one plan considers.

    A row that ends frees what it alone holds: its own slots, and the nodes that nobody else pins. Nodes of several
    rows, or of a loan, are counted once and stay.
    """

    def __init__(self, index: RadixIndex, predict: Predict, rows: int) -> None:
        self._index = index
        self._predict = predict
        self._held = np.empty(rows, np.int64)
        self._remaining = np.empty(rows, np.int64)
        self._count = 0
        self._owner: dict[Node, int] = {}  # of the nodes that one row pins, by its place in the columns
        self._owned = 0  # tokens of those nodes

    def read(self, running: Iterable[Row]) -> None:
        """Take in the rows that were admitted since the last call."""
        for row in islice(running, self._count, None):
            alone = 0
            for node in path(row.node):
                if node.pins > 1:
                    break  # and so are all above it
                self._owner[node] = self._count
                alone += len(node.keys)
            known = max(row.granted, len(row.tokens))
            self._held[self._count] = known - row.indexed + alone
            self._remaining[self._count] = max(0, self._predict(row.request) - 1 - row.request.known)
            self._owned += alone
            self._count += 1

    def peak(self, request: Request, found: list[tuple[Node, int]]) -> int:
        """Slots in use at the worst moment if `request` joins; `found` is what the index has of its tokens."""
        cached = sum(length for _, length in found)
        shared = self._index.pinned - self._owned + sum(length for node, length in found if not node.pins)
        held = np.append(self._held[: self._count], request.known - cached)
        for node, length in found:
            if (owner := self._owner.get(node)) is not None:
                held[owner] -= length
                shared += length
        grows = max(0, self._predict(request) - 1 - request.known)
        return shared + peak(held, np.append(self._remaining[: self._count], grows))

    def worst(self) -> int:
        """Slots in use at the worst moment if nobody joins."""
        held, remaining = self._held[: self._count], self._remaining[: self._count]
        return self._index.pinned - self._owned + peak(held, remaining)

    def share(self, found: list[tuple[Node, int]]) -> None:
        """The request that found these nodes has pinned them: whoever had them alone shares them from now on."""
        for node, length in found:
            if (owner := self._owner.get(node)) is not None:
                self._held[owner] -= length
                self._owned -= length
                if node.pins > 1:  # else `match` split it, and its lower part is still the owner's
                    del self._owner[node]
