"""Which row holds which slot: the pool, the index and the rows of one epoch, kept together so that every slot has one
owner. `check` in integrity.py says what must hold between any two calls.

What changes is written into the draft of the next update as it changes. One iteration is one update with chunks at
most, so slots freed here may be given away at once: whatever is in flight was launched earlier on the same stream.
"""

from typing import NamedTuple

import numpy as np

from aiollm.engine.plan import Draft
from aiollm.engine.radix import Keys, Node, RadixIndex, path
from aiollm.engine.request import Request
from aiollm.engine.rows import Column, Row, Table
from aiollm.engine.slots import SlotPool
from aiollm.wire.columns import Ints
from aiollm.wire.messages import Admit, Update


class Limits(NamedTuple):
    """Sizes are tokens unless said otherwise."""

    rows: int
    """Requests that run at once."""
    slots: int
    max_length: int
    """Prompt and output together."""
    chunk_budget: int = 2048
    """Prompt tokens of one update, at most."""
    chunk_size: int = 2048
    """Prompt tokens of one row in one update."""
    prefix_cache: bool = True


class Loan(NamedTuple):
    """KV that somebody outside the stream reads."""

    epoch: int
    node: Node
    slots: Ints


class Ledger:
    """Empty pool, index and rows, and numbers from 1: what a fresh worker has. Death of the worker ends it."""

    def __init__(self, epoch: int, limits: Limits) -> None:
        self.epoch = epoch
        self.limits = limits
        self.pool = SlotPool(limits.slots)
        self.index = RadixIndex(limits.rows + 1)
        self.table = Table(limits.rows, limits.max_length)
        self.rows: list[Row | None] = [None] * limits.rows
        self.running: dict[int, Row] = {}
        """By row index, in order of admission."""
        self.coming: dict[int, Row] = {}
        """Of them, those that do not decode yet."""
        self.free_rows = list(range(limits.rows - 1, -1, -1))
        self.draft = Draft()
        self.number = 0
        """Of the last update."""
        self.applied = 0
        """Number of the last update that is known to have run."""
        self.iterations = self.retired = 0
        """Published iterations, and rows that ended, so far."""
        self.loans = 0
        self._generations = [0] * limits.rows

    def update(self) -> Update | None:
        """What was drafted, numbered; None where nothing was."""
        if not self.draft:
            return None
        self.number += 1
        update = self.draft.packed(self.number)
        self.draft = Draft()
        return update

    # Slots

    @property
    def available(self) -> int:
        """Slots that are free, or cached for nobody who runs."""
        return self.pool.free + self.index.evictable

    def take(self, wanted: int) -> Ints:
        """Up to `wanted` slots, evicting where the pool is dry."""
        if wanted > self.pool.free:
            self.pool.give(self.index.evict(wanted - self.pool.free))
        return self.pool.take(min(wanted, self.pool.free))

    def grant(self, rows: Column, counts: Column) -> None:
        """Give `counts[i]` slots to row `rows[i]`; so many must be available."""
        slots = self.take(int(counts.sum()))
        self.draft.slots.extend(rows, self.table.put(rows, counts, slots), counts, slots)

    # Rows

    def alive(self, index: int, generation: int) -> Row | None:
        """The row that lives this life, if it still does."""
        row = self.rows[index]
        return row if row is not None and row.generation == generation else None

    def row(self, request: Request) -> Row:
        """The row of a request that runs."""
        row = self.rows[request.row]
        assert row is not None and row.request is request, "a request lost its row"
        return row

    def begin(self, request: Request, kind: int, lane: int) -> Row:
        """Give a request a row; only now it pins what is cached of it (rule I)."""
        index = self.free_rows.pop()
        self._generations[index] += 1
        root = self.index.root(request.namespace)
        row = Row(self.table, index, self._generations[index], request, root)
        self.table.kind[index], self.table.lane[index] = kind, lane
        self.rows[index] = self.running[index] = self.coming[index] = row
        self.draft.admit.append(
            Admit(index, row.generation, len(request.prompt), len(row.tokens), row.limit, request.sampling)
        )
        self.draft.tokens.add(index, 0, row.tokens)
        if self.may_match(request):
            self._match(row)
        return row

    def compute(self, row: Row, most: int) -> int:
        """Draft the next chunk of a row, of up to `most` tokens, after taking over what others have sent by now. Its
        tokens; none where the pool is dry."""
        if self.may_match(row.request) and row.sent == row.indexed:
            self._match(row)
        slots = self.take(min(len(row.tokens) - row.sent, most, self.limits.chunk_size))
        if not len(slots):
            return 0
        start, end = row.put(slots), row.sent + len(slots)
        self.draft.chunk(row.index, start, slots)
        if self.limits.prefix_cache and row.indexed == start:
            node = self.index.extend(row.node, row.tokens[start:end], slots, self.number + 1)
            if node is not None:
                self._move_pin(row, node)
                root = self.index.root(row.request.namespace)
                self.draft.indexed[row.index, row.generation, start] = root, row.tokens[:end]
        row.sent = end
        if row.decodes:
            del self.coming[row.index]
            credit = self.take(min(2, max(0, row.room - end)))  # the last chunk brings the first credit
            self.draft.slots.add(row.index, row.put(credit), credit)
        return end - start

    def retire(self, row: Row, keep: bool = True) -> None:
        """The one end of a row's life: known tokens go to the index, every other slot of the row goes back."""
        own = row.slots[row.indexed : row.granted]
        stored = row.stored
        if keep and self.limits.prefix_cache and stored > row.indexed:
            keys = row.request.tokens()[row.indexed : stored]
            node, slots = self.index.match(row.node, keys)
            if len(slots) < len(keys):
                self.index.extend(node, keys[len(slots) :], own[len(slots) : len(keys)])
            own = np.concatenate([own[: len(slots)], own[len(keys) :]])
        self.index.unpin(row.node, row.holder)
        self.pool.give(own)
        self.rows[row.index] = None
        self.table.active[row.index] = False
        del self.running[row.index]
        self.coming.pop(row.index, None)
        self.free_rows.append(row.index)
        self.draft.retire.append(row.index)
        self.retired += 1

    # The index

    def may_match(self, request: Request) -> bool:
        """Whether what is cached of a request may be taken from there."""
        return self.limits.prefix_cache and not request.wants_prompt_logprobs

    def _match(self, row: Row) -> None:
        """Extend a row's cached prefix; its last token is always computed, for the logits."""
        node, slots = self.index.match(row.node, row.tokens[row.sent : -1])
        if len(slots):
            self._move_pin(row, node)
            self.draft.slots.add(row.index, row.put(slots), slots)
            row.sent += len(slots)

    def _move_pin(self, row: Row, node: Node) -> None:
        """Pin down to `node`, which lies below what the row has pinned."""
        self.index.pin(node, row.holder, above=row.node)
        row.node, row.indexed = node, node.end

    def poison(self, top: Node) -> list[Request]:
        """Take a subtree that holds garbage out of the index; the requests whose rows stood on it must start again."""
        standing = [row for row in self.running.values() if top in path(row.node)]
        for row in standing:
            self.draft.slots.forget(row.index)
            self.retire(row, keep=False)
        self.pool.give(self.index.remove(top))
        return [row.request for row in standing]

    def lend(self, namespace: str, tokens: Keys) -> Loan:
        """Rule F: pin the cached prefix of `tokens` for a reader outside the stream (a copy to a host or a peer).

        Only what was published is lent, and it stays until `settle`.
        """
        node, slots = self.index.match(self.index.root(namespace), tokens)
        unpublished = [step for step in path(node) if step.number > self.applied]
        if unpublished:
            node = unpublished[-1].parent or node
        self.index.pin(node)
        self.loans += 1
        return Loan(self.epoch, node, slots[: node.end])

    def settle(self, loan: Loan) -> None:
        """The reader is done with a loan."""
        if loan.epoch == self.epoch:
            self.loans -= 1
            self.index.unpin(loan.node)
