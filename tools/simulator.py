"""A worker that computes nothing: the real scheduler, radix index and slot pool against a clock.

`Replica` keeps what a worker knows of its rows and draws tokens of the lengths that the workload says. `World` plays
clients, server and device: each iteration takes the time that the cost model says, the next one is launched before its
results are out (two are in flight, as in the real loop), and the server plans when results arrive. `Uneven` is what a
real machine makes of a cost model.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.request import Finish, PromptToken, Request, Token
from aiollm.engine.scheduler import Scheduler
from aiollm.wire.columns import ints, pack, pack_floats
from aiollm.wire.messages import Header, Result, Update
from aiollm.wire.sampling import SamplingParams

if TYPE_CHECKING:
    from costs import Costs, Work

EOS = 0
VOCABULARY = 50_000
TAKE = 0.002  # seconds of the server to take a request, one after the other: no two arrive at the same time
DRIFT = 10.0  # seconds over which a machine has one speed
Chunk = tuple[int, int, int]  # row, start, count


class Replica:
    """Rows as the worker sees them. `stored` tokens have KV, and the next one may be fed while `stored < granted`."""

    def __init__(self, rows: int) -> None:
        self.active, self.decodes = np.zeros(rows, bool), np.zeros(rows, bool)
        self.stored, self.granted, self.tokens, self.prompt, self.limit, self.output, self.generation = (
            np.zeros(rows, np.int64) for _ in range(7)
        )

    def apply(self, update: Update) -> list[Chunk]:
        """Take an update; its chunks."""
        self.active[ints(update.retire)] = False
        for admit in update.admit:
            at = admit.row
            self.active[at], self.decodes[at], self.stored[at], self.granted[at] = True, False, 0, 0
            self.tokens[at], self.prompt[at], self.limit[at] = admit.tokens, admit.prompt_length, admit.limit
            self.generation[at], self.output[at] = admit.generation, admit.limit
        np.add.at(self.granted, ints(update.slots.rows), ints(update.slots.counts))
        columns = (ints(column).tolist() for column in (update.chunk_rows, update.chunk_starts, update.chunk_counts))
        return list(zip(*columns, strict=True))

    def runnable(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that can decode, and rows that lack credit."""
        decoding = self.active & self.decodes
        credit = self.stored < self.granted
        return np.flatnonzero(decoding & credit), np.flatnonzero(decoding & ~credit)

    def launch(self, chunks: list[Chunk], recorded: Result | None = None) -> "Work":
        """Advance the rows of one iteration: those with credit, or those that a recorded result has."""
        from costs import Work

        if recorded is None:
            decode = self.runnable()[0]
        else:
            drawn, prompts = ints(recorded.rows).astype(np.int64), {row for row, _, _ in chunks}
            decode = np.array([row for row in drawn.tolist() if row not in prompts], np.int64)
        kv = int(self.stored[decode].sum()) + len(decode)
        self.stored[decode] += 1
        pairs = 0
        for row, start, count in chunks:
            self.stored[row] = start + count
            self.decodes[row] |= start + count >= self.tokens[row]
            pairs += start * count + count * count // 2
        return Work(len(decode), kv, sum(count for _, _, count in chunks), pairs)


class Uneven(NamedTuple):
    """How the durations of a machine lie about those of its cost model."""

    drift: Sequence[float] = ()
    """What they are by the model's, in each DRIFT seconds; 1 thereafter."""
    scatter: float = 0.0
    """Standard deviation of their logarithm."""


EVEN = Uneven()


class Device(Replica):
    """A replica that draws tokens: `output[row]` of them, the last one EOS."""

    def __init__(self, core: Scheduler, costs: "Costs | None", uneven: Uneven = EVEN, seed: int = 0) -> None:
        """`seed` is that of the scatter."""
        super().__init__(core.limits.rows)
        self._core, self._costs, self._uneven = core, costs, uneven
        self._random = np.random.default_rng(seed)
        self._updates: deque[Update] = deque()
        self._applied = self._iteration = 0
        self.computed = 0
        """Prompt tokens, those included that were computed before a pause."""

    def send(self, update: Update) -> None:
        self._updates.append(update)

    def length(self, request: Request) -> int:
        """Output tokens that a request will have."""
        assert isinstance(request.sink, Client)
        return request.sink.output

    def duration(self, work: "Work", now: float) -> float:
        """Microseconds."""
        if self._costs is None:
            return 1e6
        drift, at = self._uneven.drift, int(now / DRIFT)
        scatter = float(np.exp(self._uneven.scatter * self._random.standard_normal()))
        return self._costs.us(work) * scatter * (drift[at] if at < len(drift) else 1.0)

    def run(self, now: float = 0.0) -> Result | None:
        """One iteration: updates up to the first with chunks. The header has its duration; None if there is no work."""
        chunks: list[Chunk] = []
        while self._updates and not chunks:
            update = self._updates.popleft()
            self._applied = update.number
            chunks = self.apply(update)
            for admit in update.admit:
                row = self._core.ledger.rows[admit.row]
                if row is not None and row.generation == admit.generation:
                    self.output[admit.row] = self.length(row.request)
        decode, stalled = self.runnable()
        if not chunks and not len(decode):
            return None
        work = self.launch(chunks)
        self.computed += work.chunk
        prompts = [row for row, start, count in chunks if start + count >= self.tokens[row]]
        rows = np.concatenate([decode, np.array(prompts, np.int64)])
        outputs = self.stored[rows] + 1 - self.prompt[rows]
        last = outputs >= self.output[rows]
        ids = (self.stored[rows] * 7919 + self.generation[rows] * 104_729 + rows) % (VOCABULARY - 1) + 1
        self.decodes[rows[last | (self.stored[rows] + 1 >= self.limit[rows])]] = False
        self._iteration += 1
        us = self.duration(work, now)
        header = Header(
            self._core.epoch, self._iteration, self._iteration, self._applied, int(us), 0, pack(stalled)
        )  # fmt: skip
        return Result(
            header=header, rows=pack(rows), generations=pack(self.generation[rows]),
            tokens=pack(np.where(last, EOS, ids)), logprobs=pack_floats(np.zeros(len(rows))), hints=bytes(len(rows)),
        )  # fmt: skip


class Ask(NamedTuple):
    """One request of a workload. `output` is the length that nobody knows beforehand."""

    prompt: NDArray[np.int64]
    output: int
    max_tokens: int
    at: float = 0.0
    """Arrival in seconds, where clients do not wait for answers."""
    key: str = ""
    priority: int = 0
    certain: bool = False
    chat: int = -1
    """Conversation: its next turn is asked once this one is answered, and begins with it."""


class Client:
    """The sink of one request, and what is remembered of it. Times are seconds of the world's clock."""

    def __init__(self, ask: Ask, world: "World") -> None:
        self.ask, self.output, self._world = ask, ask.output, world
        self.request: Request
        self.arrived = world.now
        self.first = self.last = -1.0
        self.gap = 0.0
        self.finish: Finish | None = None

    def token(self, token: Token) -> None:
        now = self._world.now
        if self.first < 0:
            self.first = now
        else:
            self.gap = max(self.gap, now - self.last)
        self.last = now

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        """No one asks for these."""

    def finished(self, finish: Finish) -> None:
        self.finish = finish
        self._world.ended.append(self)


class Agreement(NamedTuple):
    """What counts as good, in seconds."""

    ttft: float = 10.0
    gap: float = 1.5
    patience: float = 8.0
    """A client that has waited for its first token for so long goes away and asks something else."""

    impatient: bool = False
    """A client whose stream stands still for longer than `gap` goes away too, as the servers of the paper's artifact
    see to; else it stays, and its answer counts for nothing."""

    def kept(self, client: Client) -> bool:
        done = client.finish is not None and client.finish.reason in ("stop", "length")
        return done and client.first - client.arrived <= self.ttft and client.gap <= self.gap


class World:
    """Clients, server and device on one clock. Without `costs` an iteration takes a second, whatever it computes."""

    def __init__(
        self, core: Scheduler, asks: Iterable[Ask], costs: "Costs | None" = None, *, clients: int = 0, backlog: int = 0,
        agreement: Agreement | None = None, overlap: int = 2, uneven: Uneven = EVEN, seed: int = 0,
    ) -> None:  # fmt: skip
        """With `clients`, so many ask one thing at a time each; with a `backlog`, so many requests always wait; with
        neither, requests arrive at their own times. `overlap` is the number of iterations in flight."""
        self.core = core
        self.device = Device(core, costs, uneven, seed)
        self.now = self.busy = 0.0
        self.iterations = 0
        self.memory: list[int] = []
        """Tokens known of the running rows, after each iteration."""
        self.clients: list[Client] = []
        self.ended: list[Client] = []
        self.on_end: Callable[[Client], None] = lambda client: None
        """Told of each answer; may `ask` for something else."""
        self._idle = costs.idle * 1e-6 if costs is not None else 0.0
        self._count, self._backlog, self._agreement, self._overlap = clients, backlog, agreement, overlap
        self._asks = iter(asks)
        self._coming: list[tuple[float, int, Ask]] = []
        if not clients and not backlog:
            for ask in self._asks:
                self.ask(ask)
        self._told = 0
        self._taken = 0.0
        self._flights: deque[Result] = deque()
        self.exhausted = False
        """The workload has nothing more to ask."""

    def ask(self, ask: Ask) -> None:
        """Something to be asked at its own time."""
        heapq.heappush(self._coming, (ask.at, len(self.clients) + len(self._coming), ask))

    def play(self, until: float = float("inf"), stop: Callable[[], bool] = lambda: False) -> None:
        """Go on until the clock says so, `stop` does, or nothing is left to do."""
        self._serve()
        while self.now < until and not stop():
            self._launch(self._overlap)
            if not self._flights:
                if not self._wait():
                    break
                continue
            result = self._flights.popleft()
            done = self.now + result.header.device_us * 1e-6 + self._idle
            while (at := self._next()) is not None and at < done:
                self.now = max(self.now, at)
                self._serve()
            self.now = done
            self.busy += result.header.device_us * 1e-6
            self.iterations += 1
            if self._overlap > 1:
                self._launch(self._overlap)  # before the server hears of what ended just now
            self.core.on_result(result)
            self._serve()
            self.memory.append(int(self.core.ledger.table.known[self.core.ledger.table.active].sum()))

    def _launch(self, most: int) -> None:
        while len(self._flights) < most and (launched := self.device.run(self.now)) is not None:
            self._flights.append(launched)

    def _serve(self) -> None:
        """What clients and server do when something happened."""
        while self._told < len(self.ended):
            self.on_end(self.ended[self._told])
            self._told += 1
        if self._agreement is not None and self._agreement.impatient:
            for request in list(self.core.waiting.returned):
                assert isinstance(request.sink, Client)
                if self.now - request.sink.last > self._agreement.gap:
                    self.core.abort(request)
        self.core.expire(self.now)
        while self._coming and self._coming[0][0] <= self.now:
            self._submit(heapq.heappop(self._coming)[2])
        while not self.exhausted and (
            len(self.clients) + len(self._coming) - len(self.ended) < self._count
            or len(self.core.waiting) < self._backlog
        ):
            ask = next(self._asks, None)
            if ask is None:
                self.exhausted = True
            elif self._count:
                self._taken = max(self._taken, self.now) + TAKE
                self.ask(ask._replace(at=self._taken))
            else:
                self._submit(ask)
        while (update := self.core.plan(self.now)) is not None:
            self.device.send(update)
            if not update.chunk_rows or self._overlap == 1:
                break  # else the chunks after these are sent too, as the engine does

    def _wait(self) -> bool:
        """The device has nothing to do: let time pass until something arrives or expires. False if nothing will."""
        at, sent = self._next(), self.core.ledger.number
        self.now = max(self.now, at or 0.0)
        self._serve()
        return at is not None or self.core.ledger.number > sent

    def _next(self) -> float | None:
        """When something is asked or expires next."""
        coming = self._coming[0][0] if self._coming else None
        times = [at for at in (coming, self.core.waiting.next_expiry) if at is not None]
        return min(times, default=None)

    def _submit(self, ask: Ask) -> None:
        client = Client(ask, self)
        client.request = Request(
            str(len(self.clients)), ask.prompt, SamplingParams(max_tokens=ask.max_tokens, stop_ids=(EOS,)), client,
            self.now, kind=ask.max_tokens.bit_length(), certain=ask.certain, priority=ask.priority, key=ask.key,
            patience=self._agreement.patience if self._agreement is not None else None,
        )  # fmt: skip
        self.clients.append(client)
        self.core.submit(client.request)
