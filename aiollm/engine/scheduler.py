"""The core: who runs, who waits, and what the workers are told. Plain synchronous code, time passed in.

`plan` drafts the next update for the workers; `on_result` and `on_failed` judge what they report (rule G). Which row
holds which slot stands in the ledger.
"""

import logging
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.credit import CreditPolicy
from aiollm.engine.door import Door
from aiollm.engine.judge import Judge, prompt_logprobs
from aiollm.engine.ledger import Ledger, Limits
from aiollm.engine.node import Keys, Node
from aiollm.engine.pace import ChunkBudget, Drain
from aiollm.engine.pausing import PauseOrder, victim
from aiollm.engine.policy import PastFuture, Policy
from aiollm.engine.queue import OUTPUT_WEIGHT, Order, Queue, seniority
from aiollm.engine.request import Finish, Request, State
from aiollm.engine.rows import Column, Row
from aiollm.engine.share import WHOLE, Shares
from aiollm.wire.columns import Ints, ints
from aiollm.wire.messages import Failed, Header, Result, Update

log = logging.getLogger(__name__)

CHUNKS_AHEAD = 3  # updates with chunks that may be sent and not yet published (rule E)
NEWCOMERS = 64  # requests that one update lets begin: each takes a quarter of a millisecond of the event loop


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


class Sent(NamedTuple):
    """An update with chunks that is not published yet; `indexed` as in its draft."""

    number: int
    tokens: int
    indexed: dict[tuple[int, int, int], tuple[Node, Keys]]


class Scheduler:
    """`check` in integrity.py says what must hold between any two calls."""

    def __init__(
        self, limits: Limits, policy: Policy | None = None, service: Service = DEFAULT, shares: Shares = WHOLE
    ) -> None:
        self.limits = limits
        self.policy = policy or PastFuture()
        self.service = service
        self.shares = shares
        self.waiting = Queue(service.order, service.ttft_target, service.queue_timeout)
        self.credit = CreditPolicy()
        self.chunks = ChunkBudget(limits.chunk_budget, service.gap_target)
        self.drain = Drain()
        self.epoch = 0
        self.paused_total = 0
        self.evicted_total = self.found_total = self.asked_total = 0
        self._now = 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """A fresh worker."""
        self.epoch += 1
        self.ledger = Ledger(self.epoch, self.limits, self.shares)
        self.door = Door(self.ledger, self.waiting, self.policy, self.chunks)
        self._sent: deque[Sent] = deque()

    # What the outside asks for

    def fits(self, prompt: int, max_tokens: int) -> bool:
        """Whether a request of these lengths can run at all: its last token has no place in a row."""
        return prompt + max_tokens - 1 <= self.limits.room

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

    def expire(self, now: float) -> None:
        """Give up requests that waited too long and never began."""
        for request in self.waiting.expired(now):
            error = f"the request waited for {now - request.arrived:.0f} s and did not begin"
            self.abort(request, Finish("timeout", error=error))

    def share(self, shares: Shares) -> None:
        """What the parts of the prefix cache may keep from now on."""
        self.shares = shares
        self.ledger.index.queues.reshare(shares)

    def abort(self, request: Request, finish: Finish = Finish("abort")) -> None:
        """End a request at any stage; its row is retired by the next update."""
        if request.state is State.RUNNING:
            self.ledger.retire(self.ledger.row(request))
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        else:
            return
        self._finish(request, finish)

    def pause(self, request: Request) -> None:
        """Rule H: retire and queue again with the tokens known now; its KV stays in the index while space lasts."""
        self.ledger.draft.slots.forget(request.row)
        self.ledger.retire(self.ledger.row(request))
        request.pauses += 1
        self.paused_total += 1
        self._requeue([request])

    def lose_worker(self) -> list[Request]:
        """Rule M: a new epoch. Running requests wait again, once; those that lost a worker before are returned."""
        running = [row.request for row in self.ledger.running.values()]
        self.evicted_total += self.ledger.index.evicted
        self.begin_epoch()
        for request in running:
            request.deaths += 1
        lost = [request for request in running if request.deaths > 1]
        self._requeue(running)
        for request in lost:
            self.abort(request, Finish("error", error="the worker process died twice under this request"))
        return lost

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.ledger.running)

    @property
    def outstanding_chunks(self) -> int:
        return len(self._sent)

    def worst(self) -> int:
        """Slots that the running rows are foreseen to use at their worst moment."""
        return self.policy.worst(self.door.look().view)

    # The next update

    def plan(self, now: float) -> Update | None:
        """Everything there is to tell the workers now, or None."""
        self._now = now
        self.ledger.release()
        self._grant_credit()
        if len(self._sent) < CHUNKS_AHEAD:
            self._send_chunks(now)
        return self.ledger.update()

    def _grant_credit(self) -> None:
        """Slots for the next steps of every row that has little credit left, all at once."""
        ledger, table = self.ledger, self.ledger.table
        decoding, each = table.decodes & table.active, self.limits.window.each
        rows = int(np.count_nonzero(decoding))
        ahead = self.credit.ahead(rows, self.limits.slots // each, ledger.available // each)
        short = decoding & (table.granted < np.minimum(table.room, table.known + ((ahead + 1) // 2 - 1)))
        if not short.any():
            return
        who = np.flatnonzero(short)
        fed = table.known[who] - 1  # position of the token that is fed next
        room, granted = table.room[who], table.granted[who]
        counts = np.minimum(room, fed + ahead) - granted
        # Where it is tight, who can take a step waits, and the next step comes first.
        if each * counts.sum() > ledger.available:
            needs = np.minimum(room, fed + 1) - granted
            who, counts = self._make_room(who[needs > 0], needs[needs > 0])
        ledger.grant(who, counts)

    def _make_room(self, rows: Column, counts: Column) -> tuple[Column, Column]:
        """Pause others, or some of `rows` themselves, until what is left of them can have its slots."""
        while self.limits.window.each * counts.sum() > self.ledger.available:
            row = self._victim()
            if row is None:  # what it lacks is on loan
                row = self.ledger.rows[int(rows[-1])]
                assert row is not None
            kept = rows != row.index
            rows, counts = rows[kept], counts[kept]
            self.pause(row.request)
        return rows, counts

    def _victim(self) -> Row | None:
        """Who makes room for the others."""
        steps: dict[int, int] = {}
        if self.service.pause_order != "fcfs":
            outlook = self.door.look()
            view, middle = outlook.view, np.full((1, len(outlook.rows)), 0.5)
            total = self.policy.history.draw(view.kind, view.done, view.cap, middle)[0]
            left = np.where(view.certain, view.cap, total) - view.done
            steps = dict(zip(outlook.rows.tolist(), left.tolist(), strict=True))
        return victim(self.ledger.running.values(), self.service.pause_order, steps, self._now)

    def _send_chunks(self, now: float) -> None:
        """Draft chunks of rows whose prompt is not computed yet, then of requests that may join them."""
        ledger = self.ledger
        table = ledger.table
        streams = np.count_nonzero(table.decodes & table.active & (table.known < table.room))
        budget = whole = self.chunks.tokens(int(streams))
        begun = 0
        for row in self._next_prompts():
            budget -= self._compute(row, budget)
        for joined in self.door.round(now) if budget > 0 else ():
            for request in joined:
                budget -= self._compute(self._begin(request, now), budget)
            begun += len(joined)
            if budget <= 0 or begun >= NEWCOMERS:
                break
        if ledger.draft.chunk_rows:
            self._sent.append(Sent(ledger.number + 1, whole - budget, ledger.draft.indexed))

    def _compute(self, row: Row, most: int) -> int:
        """Draft the next chunk of a row where there is budget left; its tokens."""
        tokens = self.ledger.compute(row, most) if most > 0 else 0
        self.waiting.serve(row.request, tokens)
        return tokens

    def _next_prompts(self) -> list[Row]:
        """The rows whose prompt is not computed yet, first come, first served. Where the pool is dry the most senior
        one comes first, and juniors make room for it before the first chunk is drafted."""
        ledger, coming, each = self.ledger, self.ledger.coming, self.limits.window.each
        if ledger.available >= each or not coming:
            return list(coming.values())
        senior = min(coming.values(), key=lambda row: seniority(row.request))
        while ledger.available < each and (other := self._victim()) is not None and other is not senior:
            self.pause(other.request)
        return [senior, *(row for row in coming.values() if row is not senior)]

    def _begin(self, request: Request, now: float) -> Row:
        """Let a waiting request run."""
        self.waiting.remove(request)
        self.drain.left(now)
        row = self.ledger.begin(request, self.policy.history.number(request.kind), self.waiting.lane(request))
        request.state, request.row = State.RUNNING, row.index
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
        ledger = self.ledger
        ledger.iterations += 1
        chunks = self._sent[0] if self._sent and self._sent[0].number == header.applied > ledger.applied else None
        self.chunks.observe(header.device_us * 1e-6, chunks.tokens if chunks else 0)
        ledger.applied = max(ledger.applied, header.applied)
        self.credit.observe(header.device_us, bool(header.stalled))
        return True

    def on_result(self, result: Result) -> int:
        """Judge the tokens of one iteration, in order (rule G); how many were taken."""
        if not self.on_header(result.header):
            return 0
        self._published(result.header.applied)
        ledger = self.ledger
        for part in result.prompts:
            owner = ledger.alive(part.row, part.generation)
            if owner is not None and (error := prompt_logprobs(owner.request, part)) is not None:
                ledger.retire(owner)
                self._finish(owner.request, error)
        judge = Judge(result, ledger.rows, ledger.table)
        for row, finish in judge.ends():
            ledger.retire(row)
            self._finish(row.request, finish)
        self._count(judge.rows, judge.alive)
        return judge.taken

    def _count(self, rows: Ints, alive: NDArray[np.bool_]) -> None:
        """Keep the columns up with what was drawn; those of rows that ended by it mean nothing any more."""
        np.add.at(self.waiting.served, self.ledger.table.lane[rows], OUTPUT_WEIGHT)
        np.add.at(self.ledger.table.known, rows[alive], 1)

    def on_failed(self, failed: Failed) -> None:
        """Rule E: fail the rows of a broken iteration, poison what its chunks should have stored."""
        if not self.on_header(failed.header):
            return
        rows, generations = ints(failed.rows).tolist(), ints(failed.generations).tolist()
        for index, generation in zip(rows, generations, strict=True):
            if (row := self.ledger.alive(index, generation)) is not None:
                self.ledger.retire(row, keep=False)
                self._finish(row.request, Finish("error", error=failed.error))
        sent = self._sent[0] if self._sent else Sent(0, 0, {})
        for key in zip(rows, generations, ints(failed.starts).tolist(), strict=True):
            if key in sent.indexed:
                top = self.ledger.index.cut(*sent.indexed[key], key[2], sent.number)
                if top is not None:
                    self._requeue(self.ledger.poison(top))
        self._published(failed.header.applied)

    def _published(self, applied: int) -> None:
        while self._sent and self._sent[0].number <= applied:
            self._sent.popleft()

    def _requeue(self, requests: list[Request]) -> None:
        """Back into the queue, before whatever never ran."""
        for request in requests:
            request.state, request.row = State.WAITING, -1
            self.waiting.push(request)

    def _finish(self, request: Request, finish: Finish) -> None:
        if finish.reason in ("stop", "length"):
            self.policy.history.add(request.kind, len(request.output))
        request.state, request.row, request.group = State.FINISHED, -1, ()
        try:
            request.sink.finished(finish)
        except Exception:
            log.exception("the output of request %s could not be closed", request.id)
