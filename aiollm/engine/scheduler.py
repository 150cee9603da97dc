"""The core: who runs, who waits, which token lies in which slot. Plain synchronous code, time passed in.

`plan` drafts the next update for the workers; `on_result` and `on_failed` judge what they report (rule G). One
iteration is one update with chunks at most, so slots freed here may be given away at once: whatever is in flight was
launched earlier on the same stream.
"""

import logging
from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import numpy as np

from aiollm.engine.credit import CreditPolicy
from aiollm.engine.judge import Judge
from aiollm.engine.node import Keys, Node, path
from aiollm.engine.outlook import Outlook, look, newcomers
from aiollm.engine.pace import ChunkBudget, Drain
from aiollm.engine.pausing import PauseOrder, victim
from aiollm.engine.plan import Draft
from aiollm.engine.policy import Gauge, PastFuture, Policy
from aiollm.engine.queue import OUTPUT_WEIGHT, Order, Queue, seniority
from aiollm.engine.radix import RadixIndex
from aiollm.engine.request import Finish, Request, State
from aiollm.engine.rows import Column, Row, Table
from aiollm.engine.slots import SlotPool
from aiollm.engine.window import Window
from aiollm.wire.columns import Ints, ints
from aiollm.wire.messages import Admit, Failed, Header, Result, Update

log = logging.getLogger(__name__)

CHUNKS_AHEAD = 2  # updates with chunks that may be sent and not yet published (rule E)
ROUND = 10  # iterations after which a request that did not fit is looked at again, as nobody ended meanwhile


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
    window: Window = Window()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can run, prompt and output together: the last one needs no slot."""
        chunk = min(self.chunk_size, self.chunk_budget)
        return min(self.max_length, self.window.longest(self.slots, chunk) + 1)


class Service(NamedTuple):
    """Who is served first, and what is aimed at. Times are seconds."""

    order: Order = "fair"
    pause_order: PauseOrder = "fcfs"
    ttft_target: float = 10.0
    """From arrival to the first token, for the orders that know a deadline."""
    gap_target: float = 0.0
    """Between two tokens of a stream; prompts are computed in smaller chunks to keep it. 0 is no target."""
    queue_timeout: float = 0.0
    """A request that waited for so long is given up; 0 is for ever."""


DEFAULT = Service()


class Loan(NamedTuple):
    """KV that somebody outside the stream reads: slots [groups, tokens], those of windows from position `kept` on."""

    epoch: int
    node: Node
    kept: int
    slots: Ints


class Sent(NamedTuple):
    """An update with chunks that is not published yet. `indexed` are those that went into the index:
    (row, generation, start) -> root and tokens up to the chunk's end."""

    number: int
    tokens: int
    indexed: dict[tuple[int, int, int], tuple[Node, Keys]]


class Scheduler:
    """`check` in integrity.py says what must hold between any two calls."""

    def __init__(self, limits: Limits, policy: Policy | None = None, service: Service = DEFAULT) -> None:
        self.limits = limits
        self.policy = policy or PastFuture()
        self.service = service
        self.waiting = Queue(service.order, service.ttft_target)
        self.credit = CreditPolicy()
        self.chunks = ChunkBudget(limits.chunk_budget, service.gap_target)
        self.drain = Drain()
        self.paused_total = 0
        self.evicted_total = self.found_total = self.asked_total = 0
        self.epoch = 0
        self._expiries: list[tuple[float, int, Request]] = []
        self._serial = count()
        self._now = 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Empty pool, index and rows, numbers from 1: a fresh worker."""
        limits = self.limits
        self.pool = SlotPool(limits.slots)
        self.index = RadixIndex(limits.rows + 1, limits.window)
        self.table = Table(limits.rows, limits.max_length, limits.window.each)
        self.rows: list[Row | None] = [None] * limits.rows
        self.running: dict[int, Row] = {}  # by row index, in order of admission
        self._coming: dict[int, Row] = {}  # of them, those that do not decode yet
        self._free_rows = list(range(limits.rows - 1, -1, -1))
        self._generations = [0] * limits.rows
        self.number = 0
        self.applied = 0
        self.loans = 0
        self._iterations = self._retired = 0
        self._refused: tuple[Request, int, int] | None = None  # who did not fit, after how many retired and iterations
        self._draft = Draft()
        self._sent: deque[Sent] = deque()
        self.epoch += 1

    # What the outside asks for

    def fits(self, prompt: int, max_tokens: int) -> bool:
        """Whether a request of these lengths can run at all."""
        return prompt + max_tokens <= self.limits.longest

    def submit(self, *requests: Request) -> None:
        """Queue requests; none of them, and ValueError, where one can never run. Neighbours with the same prompt begin
        together."""
        for request in requests:
            prompt, max_tokens = len(request.prompt), request.sampling.max_tokens
            if not prompt or max_tokens < 1 or not self.fits(prompt, max_tokens):
                raise ValueError(f"{prompt} + {max_tokens} tokens can never run")
        at = 0
        while at < len(requests):
            end = at + 1
            while end < len(requests) and requests[end].prompt is requests[at].prompt:
                end += 1
            for request in requests[at:end]:
                request.group = requests[at:end]
            at = end
        for request in requests:
            self.waiting.push(request)
            if (expires := self._expiry(request)) is not None:
                heappush(self._expiries, (expires, next(self._serial), request))

    def _expiry(self, request: Request) -> float | None:
        limits = [limit for limit in (request.patience, self.service.queue_timeout or None) if limit is not None]
        return request.arrived + min(limits) if limits else None

    @property
    def next_expiry(self) -> float | None:
        """When `expire` has something to do at the earliest."""
        while self._expiries and not self._expires(self._expiries[0][2]):
            heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def _expires(self, request: Request) -> bool:
        return request.state is State.WAITING and request.admitted is None

    def expire(self, now: float) -> None:
        """Give up requests that waited too long and never began."""
        while (expires := self.next_expiry) is not None and expires <= now:
            request = heappop(self._expiries)[2]
            error = f"the request waited for {now - request.arrived:.0f} s and did not begin"
            self.abort(request, Finish("timeout", error=error))

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
        self.evicted_total += self.index.evicted
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

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def outstanding_chunks(self) -> int:
        return len(self._sent)

    @property
    def available(self) -> int:
        """Slots that are free, or cached for nobody who runs."""
        return self.pool.free + self.index.evictable

    def worst(self) -> int:
        """Slots that the running rows are foreseen to use at their worst moment."""
        return self.policy.worst(self._look().view)

    # The next update

    def plan(self, now: float) -> Update | None:
        """Everything there is to tell the workers now, or None."""
        self._now = now
        self._release()
        self._grant_credit()
        if len(self._sent) < CHUNKS_AHEAD:
            self._send_chunks(now)
        if not self._draft:
            return None
        self.number += 1
        update = self._draft.packed(self.number)
        self._draft = Draft()
        return update

    def _take(self, wanted: int) -> Ints:
        """Slots of up to `wanted` tokens, [groups, tokens], evicting where the pool is dry."""
        return self._take_each(self.limits.window.each, wanted)

    def _take_each(self, each: int, wanted: int) -> Ints:
        """`each` slots of up to `wanted` tokens."""
        if each * wanted > self.pool.free:
            self.pool.give(self.index.evict(each * wanted - self.pool.free))
        tokens = min(wanted, self.pool.free // each)
        return self.pool.take(each * tokens).reshape(each, tokens)

    def _release(self) -> None:
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

    def _grant_credit(self) -> None:
        """Slots for the next steps of every row that has little credit left, all at once."""
        table = self.table
        rows = np.flatnonzero(table.decodes & table.active)
        each = self.limits.window.each
        ahead = self.credit.ahead(len(rows), self.limits.slots // each, self.available // each)
        fed = table.known[rows] - 1  # position of the token that is fed next
        room, granted = table.room[rows], table.granted[rows]
        short = granted < np.minimum(room, fed + (ahead + 1) // 2)
        if not short.any():
            return
        rows, counts = rows[short], (np.minimum(room, fed + ahead) - granted)[short]
        # Where it is tight, who can take a step waits, and the next step comes first.
        if each * counts.sum() > self.available:
            needs = (np.minimum(room, fed + 1) - granted)[short]
            rows, counts = self._make_room(rows[needs > 0], needs[needs > 0])
        slots = self._take(int(counts.sum()))
        self._draft.slots.extend(rows, table.put(rows, counts, slots), counts, slots)

    def _make_room(self, rows: Column, counts: Column) -> tuple[Column, Column]:
        """Pause others, or some of `rows` themselves, until what is left of them can have its slots."""
        while self.limits.window.each * counts.sum() > self.available:
            row = self._victim()
            if row is None:  # what it lacks is on loan
                row = self.rows[int(rows[-1])]
                assert row is not None
            kept = rows != row.index
            rows, counts = rows[kept], counts[kept]
            self.pause(row.request)
        return rows, counts

    def _victim(self) -> Row | None:
        """Who makes room for the others."""
        steps: dict[int, int] = {}
        if self.service.pause_order != "fcfs":
            outlook = self._look()
            view, middle = outlook.view, np.full((1, len(outlook.rows)), 0.5)
            total = self.policy.history.draw(view.kind, view.done, view.cap, middle)[0]
            left = np.where(view.certain, view.cap, total) - view.done
            steps = dict(zip(outlook.rows.tolist(), left.tolist(), strict=True))
        return victim(self.running.values(), self.service.pause_order, steps, self._now)

    def _send_chunks(self, now: float) -> None:
        """Draft chunks of rows whose prompt is not computed yet, then of requests that may join them."""
        streams = len(self.running) - len(self._coming)
        budget = whole = self.chunks.tokens(streams)
        indexed: dict[tuple[int, int, int], tuple[Node, Keys]] = {}
        for row in self._next_prompts():
            if budget > 0:
                budget = self._send_chunk(row, budget, indexed)
        gauge: tuple[Outlook, Gauge] | None = None
        while budget > 0 and (head := self._next(now)) is not None:
            if gauge is None:
                outlook = self._look()
                gauge = outlook, self.policy.open(outlook.view)
            joined = self._joining(head, *gauge)
            if not joined and not self.running:  # who is alone fits: `submit` saw to it
                joined, gauge = (head,), None
                for other in head.group:
                    other.group = ()  # they never fit together
            if not joined:
                self._refused = head, self._retired, self._iterations
                break
            for request in joined:
                row = self._begin(request, now)
                budget = self._send_chunk(row, budget, indexed) if budget > 0 else budget
        if self._draft.chunk_rows:
            self._sent.append(Sent(self.number + 1, whole - budget, indexed))

    def _next_prompts(self) -> list[Row]:
        """The rows whose prompt is not computed yet, first come, first served. Where the pool is dry the most senior
        one comes first, and juniors make room for it before the first chunk is drafted."""
        each = self.limits.window.each
        if self.available >= each or not self._coming:
            return list(self._coming.values())
        senior = min(self._coming.values(), key=lambda row: seniority(row.request))
        while self.available < each and (other := self._victim()) is not None and other is not senior:
            self.pause(other.request)
        return [senior, *(row for row in self._coming.values() if row is not senior)]

    def _send_chunk(self, row: Row, budget: int, indexed: dict[tuple[int, int, int], tuple[Node, Keys]]) -> int:
        """Draft the next chunk of a row, after taking over what others have sent by now; the budget that is left."""
        if self._may_match(row.request) and row.sent == row.indexed:
            self._match(row)
        start, wanted = row.sent, min(len(row.tokens) - row.sent, budget, self.limits.chunk_size)
        new = self._complete(row, wanted)
        at = row.granted
        row.put(self._take(new))
        end = row.granted
        if end == start:
            return budget
        self._draft.chunk(row.index, start, row.slots[:, start:end].copy())
        if self.limits.prefix_cache and row.indexed == at < end:
            slots, windows = row.slots[0, at:end], row.slots[1:, at:end]
            node = self.index.extend(row.node, row.tokens[at:end], slots, self.number + 1, windows)
            if node is not None:
                self._move_pin(row, node, self.limits.window.low(start))
        if row.indexed > start:
            indexed[row.index, row.generation, start] = (self.index.root(row.request.namespace), row.tokens[:end])
        row.sent = end
        self.waiting.serve(row.request, end - start)
        if row.decodes:
            del self._coming[row.index]
            slots = self._take(min(2, max(0, row.room - end)))  # the last chunk brings the first credit
            self._draft.slots.add(row.index, row.put(slots), slots)
        return budget - (end - start)

    def _complete(self, row: Row, wanted: int) -> int:
        """Of the next `wanted` tokens, compute again those whose windows the index has lost, in their places; how many
        are left for slots of their own.

        None where the index goes on: that is matched once these are computed, or computed again once it is published.
        """
        window, start = self.limits.window, row.sent
        if not window.groups or row.sent != row.indexed or self.loans or not self._may_match(row.request):
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

    def _may_match(self, request: Request) -> bool:
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
            self._draft.slots.add(row.index, row.put(slots), slots)
            row.sent = node.end

    def _move_pin(self, row: Row, node: Node, low: int) -> None:
        """Pin down to `node`, which lies below what the row has pinned, and guard what ends behind `low`."""
        kept = self.index.pin(node, row.holder, row.node, low)
        if row.kept == row.node.end:  # nothing above is guarded
            row.kept = kept
        row.node, row.indexed = node, node.end

    def _look(self) -> Outlook:
        budget = self.chunks.tokens(len(self.running))
        return look(self.table, self.index, self.limits.slots, self.limits.window, budget, self._coming.values())

    def _next(self, now: float) -> Request | None:
        """The request to be looked at now: the head of the queue, unless it did not fit a moment ago."""
        if not self.waiting or not self._free_rows:
            return None
        head = self.waiting.head(now)
        if head is None or self._refused is None or self._refused[0] is not head:
            return head
        _, retired, iterations = self._refused
        return head if retired != self._retired or self._iterations - iterations >= ROUND else None

    def _joining(self, head: Request, outlook: Outlook, gauge: Gauge) -> tuple[Request, ...]:
        """The head of the queue and the rest of its group, if they fit; else nobody."""
        group: tuple[Request, ...] = (head,)
        if head.admitted is None and 1 < len(head.group) <= self.limits.rows:
            group = tuple(new for new in head.group if new.admitted is None and new.state is State.WAITING)
        found = self.index.peek(self.index.root(head.namespace), head.tokens()[:-1]) if self._may_match(head) else []
        kind = self.policy.history.number(head.kind)
        if len(group) > len(self._free_rows) or not gauge.join(newcomers(outlook, found, group, kind)):
            return ()
        return group

    def _begin(self, request: Request, now: float) -> Row:
        """Give a waiting request a row; only now it pins what is cached of it (rule I)."""
        self.waiting.remove(request)
        self.drain.left(now)
        index = self._free_rows.pop()
        self._generations[index] += 1
        root = self.index.root(request.namespace)
        row = Row(self.table, index, self._generations[index], request, root)
        self.table.kind[index] = self.policy.history.number(request.kind)
        self.table.lane[index] = self.waiting.lane(request)
        self.rows[index] = self.running[index] = self._coming[index] = row
        request.state, request.row = State.RUNNING, index
        self._draft.admit.append(
            Admit(index, row.generation, len(request.prompt), len(row.tokens), row.limit, request.sampling)
        )
        self._draft.tokens.add(index, 0, row.tokens)
        if self._may_match(request):
            self._match(row)
        if request.admitted is None:
            request.admitted = now
            request.cached_tokens = row.sent
            self.asked_total += len(request.prompt)
            self.found_total += row.sent
        return row

    # What the workers report

    def on_header(self, header: Header) -> bool:
        """Take a result header; False for one of an epoch that is over."""
        if header.epoch != self.epoch:
            return False
        self._iterations += 1
        chunks = self._sent[0] if self._sent and self._sent[0].number == header.applied > self.applied else None
        self.chunks.observe(header.device_us * 1e-6, chunks.tokens if chunks else 0)
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
        self._count(ints(result.rows), ints(result.generations))
        return taken

    def _count(self, rows: Ints, generations: Ints) -> None:
        """Keep the columns up with what was drawn for rows that are still there."""
        table = self.table
        np.add.at(self.waiting.served, table.lane[rows], OUTPUT_WEIGHT)
        alive = rows[table.active[rows] & (table.generation[rows] == generations)]
        np.add.at(table.known, alive, 1)

    def on_failed(self, failed: Failed) -> None:
        """Rule E: fail the rows of a broken iteration, poison what its chunks should have stored."""
        if not self.on_header(failed.header):
            return
        rows, generations = ints(failed.rows).tolist(), ints(failed.generations).tolist()
        for index, generation in zip(rows, generations, strict=True):
            if (row := self._alive(index, generation)) is not None:
                self._retire(row, keep=False)
                self._finish(row.request, Finish("error", error=failed.error))
        sent = self._sent[0] if self._sent else Sent(0, 0, {})
        for key in zip(rows, generations, ints(failed.starts).tolist(), strict=True):
            if key in sent.indexed:
                top = self.index.cut(*sent.indexed[key], key[2], sent.number)
                if top is not None:
                    self._poison(top)
        self._published(failed.header.applied)

    def _published(self, applied: int) -> None:
        while self._sent and self._sent[0].number <= applied:
            self._sent.popleft()

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
        self._coming.pop(row.index, None)
        self._free_rows.append(row.index)
        self._draft.retire.append(row.index)
        self._retired += 1

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

    def _requeue(self, requests: list[Request]) -> None:
        """Back into the queue, before whatever never ran."""
        for request in requests:
            request.state, request.row = State.WAITING, -1
            self.waiting.push(request)

    def _finish(self, request: Request, finish: Finish) -> None:
        if finish.reason in ("stop", "length"):
            self.policy.history.add(request.kind, len(request.output))
        request.state, request.row = State.FINISHED, -1
        try:
            request.sink.finished(finish)
        except Exception:
            log.exception("the output of request %s could not be closed", request.id)
