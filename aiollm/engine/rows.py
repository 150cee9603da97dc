"""A running request's row: which of its tokens lie in which slots, and who owns those slots."""

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.radix import Node
from aiollm.engine.request import Request
from aiollm.wire.columns import Ints


class Row:
    """Positions of a row, from left to right:

        [0, indexed)         in the index: found there, or given to it when their chunk was sent
        [indexed, granted)   slots of the row itself: duplicates, generated tokens, credit

    The path to `node` ends at `indexed` and is pinned. `sent` counts the known tokens whose chunk was sent; from
    `sent == len(tokens)` on, the row decodes.
    """

    __slots__ = (
        "index", "generation", "request", "tokens", "slots", "node", "indexed", "sent", "granted", "limit",
    )  # fmt: skip

    def __init__(self, index: int, generation: int, request: Request, root: Node) -> None:
        self.index = index
        self.generation = generation
        self.request = request
        self.tokens: NDArray[np.int64] = request.tokens()
        self.limit = request.limit
        self.slots: Ints = np.zeros(self.limit, np.int32)  # zeros: memory of a far limit is touched when it is reached
        self.node = root
        self.indexed = self.sent = self.granted = 0

    @property
    def decodes(self) -> bool:
        return self.sent == len(self.tokens)

    @property
    def room(self) -> int:
        """Positions that ever need a slot: the last token of a sequence is never fed back."""
        return self.limit - 1

    @property
    def stored(self) -> int:
        """Leading positions whose KV may stay in the index: what is there already, and all but the last of the known
        tokens once one was drawn. Before that, a chunk outside the index may still be on its way, or fail."""
        known = self.request.known
        return max(self.indexed, known - 1) if known > len(self.tokens) else self.indexed

    def put(self, slots: Ints) -> int:
        """Append slots behind `granted`; the position where they begin."""
        start = self.granted
        self.slots[start : start + len(slots)] = slots
        self.granted += len(slots)
        return start
