"""The core: who runs, who waits, which token lies in which slot. Plain synchronous code, time passed in.

`plan` drafts the next update for the workers; `on_result` and `on_failed` judge what they report (rule G). One
iteration is one update with chunks at most, so slots freed here may be given away at once: whatever is in flight was
launched earlier on the same stream.
"""

import logging
from collections import deque
from typing import NamedTuple

import numpy as np

from aiollm.engine.admission import Outlook, Predict
from aiollm.engine.credit import CreditPolicy
from aiollm.engine.judge import Judge
from aiollm.engine.plan import Draft
from aiollm.engine.radix import Keys, Node, RadixIndex, path
from aiollm.engine.request import Finish, Request, State
from aiollm.engine.rows import Row
from aiollm.engine.slots import SlotPool
from aiollm.wire.columns import Ints, ints
from aiollm.wire.messages import Admit, Failed, Header, Result, Update

log = logging.getLogger(__name__)

CHUNKS_AHEAD = 2  # updates with chunks that may be sent and not yet published (rule E)


class Limits(NamedTuple):
    """Sizes are tokens unless said otherwise."""

    rows: int
    """Requests that run at once."""
    slots: int
    max_length: int
    """Prompt and output together."""
    chunk_budget: int = 2048
    """Prompt tokens of one update."""
    chunk_size: int = 2048
    """Prompt tokens of one row in one update."""
    prefix_cache: bool = True


class Loan(NamedTuple):
    """KV that somebody outside the stream reads."""

    epoch: int
    node: Node
    slots: Ints


Sent = dict[tuple[int, int, int], tuple[Node, Keys]]
"""The chunks of one update that went into the index: (row, generation, start) -> root and tokens up to its end."""


def worst_case(request: Request) -> int:
    """Conservative admission: every request uses its max_tokens."""
    return request.limit


def aggressive(request: Request) -> int:
    """Admit whatever fits now; rows that do not fit later are paused, and come back when their worst case fits."""
    return request.limit if request.pauses else request.known + 1


class Scheduler:
    """`check` in integrity.py says what must hold between any two calls."""

    def __init__(self, limits: Limits, predict: Predict = worst_case) -> None:
        self.limits = limits
        self.predict = predict
        self.waiting: deque[Request] = deque()
        self.credit = CreditPolicy()
        self.paused_total = 0
        self.epoch = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Empty pool, index and rows, numbers from 1: a fresh worker."""
        limits = self.limits
        self.pool = SlotPool(limits.slots)
        self.index = RadixIndex()
        self.rows: list[Row | None] = [None] * limits.rows
        self.running: dict[int, Row] = {}  # by row index, in order of admission
        self._free_rows = list(range(limits.rows - 1, -1, -1))
        self._generations = [0] * limits.rows
        self.number = 0
        self.applied = 0
        self.loans = 0
        self._refused: tuple[Request, int, int] | None = None  # who did not fit, beside how many rows and pinned tokens
        self._draft = Draft()
        self._chunks: deque[tuple[int, Sent]] = deque()
        self.epoch += 1

    # What the outside asks for

    def fits(self, prompt: int, max_tokens: int) -> bool:
        """Whether a request of these lengths can run at all."""
        return prompt + max_tokens <= self.limits.max_length and prompt + max_tokens - 1 <= self.limits.slots

    def submit(self, *requests: Request) -> None:
        """Queue requests, first come, first served; none of them, and ValueError, where one does not fit."""
        for request in requests:
            prompt, max_tokens = len(request.prompt), request.sampling.max_tokens
            if not prompt or max_tokens < 1 or not self.fits(prompt, max_tokens):
                raise ValueError(f"{prompt} + {max_tokens} tokens can never run")
        self.waiting.extend(requests)

    def abort(self, request: Request, finish: Finish = Finish("abort")) -> None:
        """End a request at any stage; its row is retired by the next update."""
        if request.state is State.RUNNING:
            self._retire(self._row(request))
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        else:
            return
        self._finish(request, finish)

    def pause(self, request: Request) -> None:
        """Rule H: retire and queue again with the tokens known now; its KV stays in the index while space lasts."""
        self._draft.slots.forget(request.row)
        self._retire(self._row(request))
        request.pauses += 1
        self.paused_total += 1
        self._requeue([request])

    def lose_worker(self) -> list[Request]:
        """Rule M: a new epoch. Running requests wait again, once; those that lost a worker before are returned."""
        running = [row.request for row in self.running.values()]
        self.begin_epoch()
        for request in running:
            request.deaths += 1
        lost = [request for request in running if request.deaths > 1]
        self._requeue(running)
        for request in lost:
            self.abort(request, Finish("error", error="the worker process died twice under this request"))
        return lost

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

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def outstanding_chunks(self) -> int:
        return len(self._chunks)

    # The next update

    def plan(self, now: float) -> Update | None:
        """Everything there is to tell the workers now, or None."""
        self._grant_credit()
        if len(self._chunks) < CHUNKS_AHEAD:
            sent: Sent = {}
            self._outlook = Outlook(self.index, self.predict, self.limits.rows)
            budget = self._send_chunks(self.limits.chunk_budget, sent)
            while budget > 0 and (row := self._admit(now)):
                budget = self._send_chunk(row, budget, sent)
            if self._draft.chunk_rows:
                self._chunks.append((self.number + 1, sent))
        if not self._draft:
            return None
        self.number += 1
        update = self._draft.packed(self.number)
        self._draft = Draft()
        return update

    def _available(self) -> int:
        return self.pool.free + self.index.evictable

    def _take(self, count: int) -> Ints:
        """Up to `count` slots, evicting where the pool is dry."""
        if count > self.pool.free:
            self.pool.give(self.index.evict(count - self.pool.free))
        return self.pool.take(min(count, self.pool.free))

    def _grant_credit(self) -> None:
        decoding = [row for row in self.running.values() if row.decodes]
        ahead = self.credit.ahead(len(decoding), self.limits.slots, self._available())
        for row in decoding:
            if self.rows[row.index] is not row:
                continue  # paused for an earlier row's sake
            fed = row.request.known - 1  # position of the token that is fed next
            if row.granted >= min(row.room, fed + (ahead + 1) // 2):
                continue
            target = min(row.room, fed + ahead)
            while target > row.granted:
                slots = self._take(target - row.granted)
                if len(slots):
                    self._draft.slots.add(row.index, row.put(slots), slots)
                if row.granted > fed or not self._make_room(row):
                    break

    def _make_room(self, row: Row) -> bool:
        """Pause the row that was admitted last, so that `row` can take its next step; False if that is `row`."""
        victim = next(reversed(self.running.values()))
        self.pause(victim.request)
        return victim is not row

    def _send_chunks(self, budget: int, sent: Sent) -> int:
        for row in [row for row in self.running.values() if not row.decodes]:
            if budget <= 0:
                break
            if self.rows[row.index] is not row:
                continue  # paused for the first row's sake
            while not self._available() and row is next(iter(self.running.values())) and len(self.running) > 1:
                self._make_room(row)
            budget = self._send_chunk(row, budget, sent)
        return budget

    def _send_chunk(self, row: Row, budget: int, sent: Sent) -> int:
        """Draft the next chunk of a row, after taking over what others have sent by now; the budget that is left."""
        if self._may_match(row.request) and row.sent == row.indexed:
            self._match(row)
        slots = self._take(min(len(row.tokens) - row.sent, budget, self.limits.chunk_size))
        if not len(slots):
            return 0
        start, end = row.put(slots), row.sent + len(slots)
        self._draft.chunk(row.index, start, slots)
        if self.limits.prefix_cache and row.indexed == start:
            node = self.index.extend(row.node, row.tokens[start:end], slots, self.number + 1)
            if node is not None:
                self._move_pin(row, node)
                sent[row.index, row.generation, start] = (self.index.root(row.request.namespace), row.tokens[:end])
        row.sent = end
        if row.decodes and end < row.room:  # the last chunk brings the first credit
            slots = self._take(min(2, row.room - end))
            self._draft.slots.add(row.index, row.put(slots), slots)
        return budget - (end - start)

    def _may_match(self, request: Request) -> bool:
        return self.limits.prefix_cache and not request.wants_prompt_logprobs

    def _match(self, row: Row) -> None:
        """Extend a row's cached prefix; its last token is always computed, for the logits."""
        node, slots = self.index.match(row.node, row.tokens[row.sent : -1])
        if len(slots):
            self._move_pin(row, node)
            self._draft.slots.add(row.index, row.put(slots), slots)
            row.sent += len(slots)

    def _move_pin(self, row: Row, node: Node) -> None:
        self.index.pin(node)
        self.index.unpin(row.node)
        row.node, row.indexed = node, node.end

    def _admit(self, now: float) -> Row | None:
        """Give the oldest waiting request a row, if the predicted peak of KV use fits (rule I: only now it pins)."""
        if not self.waiting or not self._free_rows:
            return None
        request = self.waiting[0]
        asked = request, len(self.running), self.index.pinned
        if asked == self._refused:
            return None  # rows only grow: nothing fits now that did not fit then
        root = self.index.root(request.namespace)
        found = self.index.peek(root, request.tokens()[:-1]) if self._may_match(request) else []
        if self.running:
            self._outlook.read(self.running.values())
            if self._outlook.peak(request, found) > self.limits.slots:
                self._refused = asked
                return None
        self.waiting.popleft()
        index = self._free_rows.pop()
        self._generations[index] += 1
        row = Row(index, self._generations[index], request, root)
        self.rows[index] = self.running[index] = row
        request.state, request.row = State.RUNNING, index
        self._draft.admit.append(
            Admit(index, row.generation, len(request.prompt), len(row.tokens), row.limit, request.sampling)
        )
        self._draft.tokens.add(index, 0, row.tokens)
        if found:
            self._match(row)
            self._outlook.share(found)
        if request.admitted is None:
            request.admitted = now
            request.cached_tokens = row.sent
        return row

    # What the workers report

    def on_header(self, header: Header) -> bool:
        """Take a result header; False for one of an epoch that is over."""
        if header.epoch != self.epoch:
            return False
        self.applied = max(self.applied, header.applied)
        self.credit.observe(header.device_us, bool(header.stalled))
        return True

    def on_result(self, result: Result) -> int:
        """Judge the tokens of one iteration, in order (rule G); how many were taken."""
        if not self.on_header(result.header):
            return 0
        self._published(result.header.applied)
        judge = Judge(result)
        for part in result.prompts:
            row = self._alive(part.row, part.generation)
            if row is not None and (finish := judge.prompt_logprobs(row.request, part)) is not None:
                self._retire(row)
                self._finish(row.request, finish)
        taken = 0
        for at, (index, generation) in enumerate(judge.rows):
            if (row := self._alive(index, generation)) is not None:
                taken += 1
                if (finish := judge.token(row.request, at)) is not None:
                    self._retire(row)
                    self._finish(row.request, finish)
        return taken

    def on_failed(self, failed: Failed) -> None:
        """Rule E: fail the rows of a broken iteration, poison what its chunks should have stored."""
        if not self.on_header(failed.header):
            return
        rows, generations = ints(failed.rows).tolist(), ints(failed.generations).tolist()
        for index, generation in zip(rows, generations, strict=True):
            if (row := self._alive(index, generation)) is not None:
                self._retire(row, keep=False)
                self._finish(row.request, Finish("error", error=failed.error))
        number, sent = self._chunks[0] if self._chunks else (0, {})
        for key in zip(rows, generations, ints(failed.starts).tolist(), strict=True):
            if key in sent and (top := self.index.cut(*sent[key], key[2], number)) is not None:
                self._poison(top)
        self._published(failed.header.applied)

    def _published(self, applied: int) -> None:
        while self._chunks and self._chunks[0][0] <= applied:
            self._chunks.popleft()

    def _poison(self, top: Node) -> None:
        """Take a subtree that holds garbage out of the index; rows that stand on it start again."""
        standing = [row for row in self.running.values() if top in path(row.node)]
        for row in standing:
            self._draft.slots.forget(row.index)
            self._retire(row, keep=False)
        self.pool.give(self.index.remove(top))
        self._requeue([row.request for row in standing])

    # Rows

    def _alive(self, index: int, generation: int) -> Row | None:
        row = self.rows[index]
        return row if row is not None and row.generation == generation else None

    def _row(self, request: Request) -> Row:
        row = self.rows[request.row]
        assert row is not None and row.request is request, "a request lost its row"
        return row

    def _retire(self, row: Row, keep: bool = True) -> None:
        """The one end of a row's life: known tokens go to the index, every other slot of the row goes back."""
        own = row.slots[row.indexed : row.granted]
        stored = row.stored
        if keep and self.limits.prefix_cache and stored > row.indexed:
            keys = row.request.tokens()[row.indexed : stored]
            node, slots = self.index.match(row.node, keys)
            if len(slots) < len(keys):
                self.index.extend(node, keys[len(slots) :], own[len(slots) : len(keys)])
            own = np.concatenate([own[: len(slots)], own[len(keys) :]])
        self.index.unpin(row.node)
        self.pool.give(own)
        self.rows[row.index] = None
        del self.running[row.index]
        self._free_rows.append(row.index)
        self._draft.retire.append(row.index)

    def _requeue(self, requests: list[Request]) -> None:
        """Back into the queue, before whatever arrived later."""
        for request in requests:
            request.state, request.row = State.WAITING, -1
        if requests:
            self.waiting = deque(sorted([*requests, *self.waiting], key=lambda request: request.arrived))

    def _finish(self, request: Request, finish: Finish) -> None:
        request.state, request.row = State.FINISHED, -1
        try:
            request.sink.finished(finish)
        except Exception:
            log.exception("the output of request %s could not be closed", request.id)
