"""The rows: which of a running request's tokens lie in which slots, and who owns those slots.

What the scheduler asks of all rows at every plan stands in columns, so that it costs the same for 16 rows and, nearly,
for 4,096.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.node import Node
from aiollm.engine.request import Request
from aiollm.wire.columns import Ints

Column = NDArray[np.int64]


class Table:
    """Columns by row index; those of a row that is not `active` mean nothing.

    known    tokens of the request, prompt and output
    tokens   of them, those known when the row's life began: from `sent == tokens` on, the row `decodes`
    granted  positions that have a slot
    indexed  of them, those whose slots the index owns
    low      position before which slots of windows went back; the row's own begin there or behind `indexed`
    room     positions that ever need one: the last token of a sequence is never fed back
    prompt, cap   prompt tokens, max_tokens
    certain  nothing but max_tokens ends the output
    kind     class of the request in the history of lengths
    lane     whose tokens they are, in the queue's count

    `slots` [groups, rows, positions]: those of the layers that see everything, then those of each group with a window.
    """

    def __init__(self, rows: int, max_length: int, groups: int = 1) -> None:
        def column() -> Column:
            return np.zeros(rows, np.int64)

        self.active, self.decodes, self.certain = (np.zeros(rows, bool) for _ in range(3))
        self.known, self.tokens, self.granted, self.indexed = column(), column(), column(), column()
        self.room, self.prompt, self.cap, self.kind = column(), column(), column(), column()
        self.generation, self.lane, self.low = column(), column(), column()
        self.slots = _untouched(groups * rows, max_length).reshape(groups, rows, max_length)

    def put(self, rows: Column, counts: Column, slots: Ints) -> Column:
        """Append `counts[i]` of the `slots` [groups, n], in order, to row `rows[i]`; the positions where they begin."""
        starts = self.granted[rows]
        ends = np.cumsum(counts)
        steps = np.arange(slots.shape[-1]) + np.repeat(starts - ends + counts, counts)
        self.slots[:, np.repeat(rows, counts), steps] = slots
        self.granted[rows] += counts
        return starts


class Row:
    """Positions of a row, from left to right:

        [0, indexed)         in the index: found there, or given to it when their chunk was sent
        [indexed, granted)   slots of the row itself: duplicates, generated tokens, credit

    The path to `node` ends at `indexed` and is pinned; of it, the nodes that begin at `kept` or behind are guarded.
    `sent` counts the known tokens whose chunk was sent. `slots` [groups, positions] are those of all layers.
    """

    __slots__ = ("table", "index", "generation", "request", "tokens", "slots", "node", "kept", "limit", "_sent")

    def __init__(self, table: Table, index: int, generation: int, request: Request, root: Node) -> None:
        self.table = table
        self.index = index
        self.generation = generation
        self.request = request
        self.tokens: NDArray[np.int64] = request.tokens()
        self.limit = request.limit
        self.slots: Ints = table.slots[:, index]
        self.node = root
        self.kept = 0
        self._sent = 0
        table.active[index], table.decodes[index], table.certain[index] = True, False, request.certain
        table.generation[index] = generation
        table.known[index] = table.tokens[index] = len(self.tokens)
        table.granted[index] = table.indexed[index] = table.low[index] = 0
        table.room[index], table.prompt[index] = self.room, len(request.prompt)
        table.cap[index] = request.sampling.max_tokens

    @property
    def granted(self) -> int:
        return int(self.table.granted[self.index])

    @property
    def indexed(self) -> int:
        return int(self.table.indexed[self.index])

    @indexed.setter
    def indexed(self, count: int) -> None:
        self.table.indexed[self.index] = count

    @property
    def low(self) -> int:
        return int(self.table.low[self.index])

    @low.setter
    def low(self, position: int) -> None:
        self.table.low[self.index] = position

    @property
    def sent(self) -> int:
        return self._sent

    @sent.setter
    def sent(self, count: int) -> None:
        self._sent = count
        self.table.decodes[self.index] = self.decodes

    @property
    def next(self) -> int:
        """The position that is computed next, as far as the server knows: nothing will look back from before it."""
        return self.request.known - 1 if self.decodes else self._sent

    @property
    def holder(self) -> int:
        """Under which number the row pins nodes of the index; 0 is for loans."""
        return self.index + 1

    @property
    def decodes(self) -> bool:
        return self._sent == len(self.tokens)

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
        """Append slots [groups, n] behind `granted`; the position where they begin."""
        start, end = self.granted, self.granted + slots.shape[-1]
        self.slots[:, start:end] = slots
        self.table.granted[self.index] = end
        return start


def _untouched(rows: int, length: int) -> Ints:
    """Zeros whose memory is taken page by page as it is written: most rows stay far from the longest length, and
    numpy's own zeros come in huge pages."""
    memory = mmap.mmap(-1, max(1, rows * length * 4))
    return np.frombuffer(memory, np.int32, rows * length).reshape(rows, length)
