"""Which row holds which slot: the pool, the index and the rows of one epoch, kept together so that every slot has one
owner. `check` in integrity.py says what must hold between any two calls.

What changes is written into the draft of the next update as it changes. One iteration is one update with chunks at
most, so slots freed here may be given away at once: whatever is in flight was launched earlier on the same stream.
"""

from typing import NamedTuple

import numpy as np

from aiollm.engine.node import Keys, Node, path
from aiollm.engine.plan import Draft
from aiollm.engine.radix import RadixIndex
from aiollm.engine.request import Request
from aiollm.engine.rows import Column, Row, Table
from aiollm.engine.share import WHOLE, Shares
from aiollm.engine.slots import SlotPool
from aiollm.engine.window import NO_WINDOW, Window
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
    window: Window = NO_WINDOW

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is served, prompt and output together: the last one needs no slot."""
        return min(self.max_length, self._positions + 1)

    @property
    def room(self) -> int:
        """Positions of a row: tokens of the longest prompt of which one token is drawn, and nothing told."""
        return min(self.max_length, self._positions)

    @property
    def _positions(self) -> int:
        """Those of the longest row that the pool holds."""
        return self.window.longest(self.slots, min(self.chunk_size, self.chunk_budget))


class Loan(NamedTuple):
    """KV that somebody outside the stream reads: slots [groups, tokens], those of windows from position `kept` on."""

    epoch: int
    node: Node
    kept: int
    slots: Ints


class Ledger:
    """Empty pool, index and rows, and numbers from 1: what a fresh worker has. Death of the worker ends it."""

    def __init__(self, epoch: int, limits: Limits, shares: Shares = WHOLE) -> None:
        self.epoch = epoch
        self.limits = limits
        self.pool = SlotPool(limits.slots)
        self.index = RadixIndex(limits.rows + 1, limits.window, shares)
        self.table = Table(limits.rows, limits.max_length, limits.window.each)
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
        """Slots of up to `wanted` tokens, [groups, tokens], evicting where the pool is dry."""
        return self._take_each(self.limits.window.each, wanted)

    def evict(self, wanted: int) -> int:
        """Free at least so many slots of what is cached for nobody who runs, or all of them; how many."""
        freed = self.index.evict(wanted)
        self.pool.give(freed)
        return len(freed)

    def _take_each(self, each: int, wanted: int) -> Ints:
        """`each` slots of up to `wanted` tokens."""
        if each * wanted > self.pool.free:
            self.evict(each * wanted - self.pool.free)
        tokens = min(wanted, self.pool.free // each)
        return self.pool.take(each * tokens).reshape(each, tokens)

    def release(self) -> None:
        """Take back slots of windows that nothing still to be sent looks back to: what was sent before this update runs
        before it. Rows that know more tokens are further on than that."""
        window, table = self.limits.window, self.table
        if not window.groups:
            return
        for index in np.flatnonzero(table.active & (table.known - window.behind >= table.low + window.step)).tolist():
            row = self.rows[index]
            assert row is not None
            low = window.low(row.next)
            if low >= row.low + window.step:
                self._release_row(row, low)

    def _release_row(self, row: Row, low: int) -> None:
        """Take back a row's slots of windows before position `low`."""
        begin, end = max(row.indexed, row.low), min(low, row.granted)
        if begin < end:
            self.pool.give(row.slots[1:, begin:end].ravel())
        row.low = max(row.low, low)
        tail = self.limits.window.low(len(row.request.prompt))  # where others are likely to part from it
        row.kept = self.index.release(row.node, row.kept, low, tail)

    def grant(self, rows: Column, counts: Column) -> None:
        """Give slots of `counts[i]` tokens to row `rows[i]`; so many must be available."""
        if not len(rows):
            return  # an empty run would make an update of nothing
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
        start, wanted = row.sent, min(len(row.tokens) - row.sent, most, self.limits.chunk_size)
        new = self._complete(row, wanted)
        at = row.granted
        row.put(self.take(new))
        end = row.granted
        if end == start:
            return 0
        self.draft.chunk(row.index, start, row.slots[:, start:end].copy())
        # While a grammar is being built a row computes the last token of its prompt again, and where that fails nobody
        # else may hold what it left: its slot stays the row's own.
        shared = end - (end == len(row.tokens) and bool(row.request.sampling.constraints))
        if self.limits.prefix_cache and row.indexed == at < shared:
            slots, windows = row.slots[0, at:shared], row.slots[1:, at:shared]
            node = self.index.extend(row.node, row.tokens[at:shared], slots, self.number + 1, windows)
            if node is not None:
                self._move_pin(row, node, self.limits.window.low(start))
        if row.indexed > start:
            root = self.index.root(row.request.namespace)
            self.draft.indexed[row.index, row.generation, start] = root, row.tokens[:end]
        row.sent = end
        if row.decodes:
            del self.coming[row.index]
            credit = self.take(min(2, max(0, row.room - end)))  # the last chunk brings the first credit
            self.draft.slots.add(row.index, row.put(credit), credit)
        return end - start

    def _complete(self, row: Row, wanted: int) -> int:
        """Of the next `wanted` tokens, compute again those whose windows the index has lost, in their places; how many
        are left for slots of their own.

        None where the index goes on: that is matched once these are computed, or computed again once it is published.
        """
        window, start = self.limits.window, row.sent
        if not window.groups or row.sent != row.indexed or self.loans or not self.may_match(row.request):
            return wanted
        end = start + wanted
        while row.indexed < end:
            found = self.index.step(row.node, row.tokens[row.indexed : min(end, len(row.tokens) - 1)])
            if found is None:
                break
            child, length = found
            length = min(length, self.available // (window.groups + (not child.pins)))
            if child.windows is not None or child.number > self.applied or not length:
                return 0
            node = self.index.take_over(child, length)
            self._move_pin(row, node, window.low(start))
            self.index.complete(node, self._take_each(window.groups, length))
            node.number = self.number + 1
            row.put(self.index.slots(node, node.start))
        return end - row.indexed

    def retire(self, row: Row, keep: bool = True) -> None:
        """The one end of a row's life: known tokens go to the index, every other slot of the row goes back."""
        window = self.limits.window
        if (low := window.low(row.next - window.step)) > row.low:
            self._release_row(row, low)  # nodes are as short as `Window.worst` has it
        begin = end = row.indexed
        if keep and self.limits.prefix_cache and row.stored > begin:
            end = row.stored
            begin = self._keep(row, end)
        low, slots = max(row.indexed, row.low), row.slots
        self.index.unpin(row.node, row.holder, row.kept)
        self.pool.give(np.concatenate([
            slots[0, row.indexed : begin], slots[0, end : row.granted],
            slots[1:, low : max(low, begin)].ravel(), slots[1:, max(low, end) : row.granted].ravel(),
        ]))  # fmt: skip
        self.rows[row.index] = None
        self.table.active[row.index] = False
        del self.running[row.index]
        self.coming.pop(row.index, None)
        self.free_rows.append(row.index)
        self.draft.retire.append(row.index)
        self.retired += 1

    # The index

    def _keep(self, row: Row, end: int) -> int:
        """Give the index what it has not of a row's tokens up to `end`; the position where that begins."""
        tokens = row.request.tokens()
        node, known = self.index.trace(row.node, tokens[row.indexed : end])
        begin = row.indexed + known
        middle = min(max(begin, row.low), end)  # windows are there from here on
        for start, stop in ((begin, middle), (middle, end)):
            if start < stop:
                windows = row.slots[1:, start:stop] if start >= row.low else None
                kept = self.index.extend(node, tokens[start:stop], row.slots[0, start:stop], windows=windows)
                assert kept is not None, "the index goes on where it ended"
                node = kept
        return begin

    def may_match(self, request: Request) -> bool:
        """Whether what is cached of a request may be taken from there."""
        return self.limits.prefix_cache and not request.wants_prompt_logprobs

    def _match(self, row: Row) -> None:
        """Extend a row's cached prefix; its last token is always computed, for the logits."""
        node, found = self.index.match(row.node, row.tokens[row.sent : -1])
        if len(found):
            low = self.limits.window.low(node.end)
            if low > row.low:
                self._release_row(row, low)
            self._move_pin(row, node, low)
            slots = self.index.slots(node, row.sent)
            self.draft.slots.add(row.index, row.put(slots), slots)
            row.sent = node.end

    def _move_pin(self, row: Row, node: Node, low: int) -> None:
        """Pin down to `node`, which lies below what the row has pinned, and guard what ends behind `low`."""
        kept = self.index.pin(node, row.holder, row.node, low)
        if row.kept == row.node.end:  # nothing above is guarded
            row.kept = kept
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
        node, _ = self.index.match(self.index.root(namespace), tokens)
        unpublished = [step for step in path(node) if step.number > self.applied]
        if unpublished:
            above = unpublished[-1].parent or node
            node, _ = self.index.match(self.index.root(namespace), tokens[: above.end])
        kept = self.index.pin(node, low=self.limits.window.low(node.end))
        self.loans += 1
        return Loan(self.epoch, node, kept, self.index.slots(node, 0))

    def settle(self, loan: Loan) -> None:
        """The reader is done with a loan."""
        if loan.epoch == self.epoch:
            self.loans -= 1
            self.index.unpin(loan.node, kept=loan.kept)
