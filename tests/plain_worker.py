"""A synchronous worker without a model: it keeps the contract of the loop and checks every KV slot that it reads.

A slot holds the hash of all tokens up to its own. The next token is a function of the hash at the last position
(`reply`), so a request's whole output is known beforehand, whatever was cached, paused, shared or lost on the way.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from aiollm.engine.integrity import check
from aiollm.engine.ledger import Limits
from aiollm.engine.policy import Conservative, Policy
from aiollm.engine.request import Finish, PromptToken, Request, State, Token
from aiollm.engine.scheduler import DEFAULT, Scheduler, Service
from aiollm.engine.share import WHOLE, Shares
from aiollm.engine.window import NO_WINDOW, Window
from aiollm.wire.columns import Runs, ints, pack, pack_floats
from aiollm.wire.messages import Failed, Header, PromptLogprobs, Result, Update
from aiollm.wire.sampling import SamplingParams
from aiollm.workers.rows import Rows

VOCABULARY = 50
EMPTY, GARBAGE = -1, -2  # what a slot holds before its first store, and after a failed one


def hashes(tokens: Sequence[int]) -> list[int]:
    """The hash of each prefix."""
    known, value = [], 7
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % 2_147_483_647
        known.append(value)
    return known


def reply(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow a prompt."""
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(hashes(tokens)[-1] % VOCABULARY)
    return tokens[len(prompt) :]


class Sink:
    """Keeps what a request put out."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.prompt: list[PromptToken] = []
        self.finish: Finish | None = None

    def token(self, token: Token) -> str | None:
        assert self.finish is None
        self.tokens.append(token)
        return None

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        self.prompt += tokens

    def finished(self, finish: Finish) -> None:
        assert self.finish is None, "ended twice"
        self.finish = finish

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def ask(
    prompt: Sequence[int], max_tokens: int = 4, arrived: float = 0.0, namespace: str = "", **sampling: Any
) -> Request:  # fmt: skip
    """A request with a `Sink`."""
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request("r", np.array(prompt, np.int64), params, Sink(), arrived, namespace)


def sink(request: Request) -> Sink:
    assert isinstance(request.sink, Sink)
    return request.sink


class PlainWorker:
    """Iterations one at a time; `computed` counts prompt tokens, `decoded` the others."""

    def __init__(self, core: Scheduler) -> None:
        limits = core.limits
        self.epoch = core.epoch
        self.rows = Rows(limits.rows)
        self.queue: deque[Update] = deque()
        self.slots = np.full((limits.rows, limits.max_length), -1)
        self.tokens = np.full((limits.rows, limits.max_length + 1), -1)
        self.kv = np.full(limits.slots, EMPTY)
        self.applied = self.iteration = self.computed = self.decoded = 0
        self.fails = False

    def step(self) -> Result | Failed | None:
        """One iteration: updates up to the first with chunks, its chunks, one token of every row with credit."""
        chunks: list[tuple[int, int, int]] = []
        while self.queue and not chunks:
            update = self.queue.popleft()
            assert update.number == self.applied + 1
            self.applied = update.number
            self.rows.apply(update)
            self._lay(self.slots, update.slots)
            self._lay(self.tokens, update.tokens)
            columns = (update.chunk_rows, update.chunk_starts, update.chunk_counts)
            chunks = list(zip(*(ints(column).tolist() for column in columns), strict=True))
        decoding, stalled = self.rows.runnable()
        work = [(row, int(self.rows.position[row]), 1) for row in decoding.tolist()] + chunks
        if not work:
            return None
        self.iteration += 1
        header = Header(self.epoch, self.iteration, self.iteration, self.applied, 1000, 0, pack(stalled))
        for row, start, count in work:  # within an iteration every store precedes every read
            self._store(row, start, count)
        self.decoded += len(decoding)
        self.computed += sum(count for _, _, count in chunks)
        for row, start, count in work:
            self.rows.launched(np.array([row]), np.array([start + count]))
        if self.fails:
            return self._failure(header, work)
        return self._result(header, work)

    def _lay(self, table: np.ndarray, runs: Runs) -> None:
        values = ints(runs.values)
        for row, start, count in zip(*(ints(c).tolist() for c in (runs.rows, runs.starts, runs.counts)), strict=True):
            table[row, start : start + count], values = values[:count], values[count:]

    def _store(self, row: int, start: int, count: int) -> None:
        known, slots = hashes(self.tokens[row, : start + count].tolist()), self.slots[row, : start + count]
        spoilt = self.fails or GARBAGE in self.kv[slots[:start]]
        self.kv[slots[start:]] = GARBAGE if spoilt else known[start:]

    def _result(self, header: Header, work: list[tuple[int, int, int]]) -> Result:
        rows, drawn, prompts = [], [], []
        for row, start, count in work:
            end, prompt = start + count, int(self.rows.prompt[row])
            known = hashes(self.tokens[row, :end].tolist())
            kv = self.kv[self.slots[row, :end]]
            assert ((kv == known) | (kv == GARBAGE)).all(), "a slot holds something else"
            generation, sampling = int(self.rows.generation[row]), self.rows.sampling[row]
            targets = self.tokens[row, start + 1 : min(end + 1, prompt)]
            if sampling.prompt_logprobs >= 0 and len(targets):
                prompts.append(
                    PromptLogprobs(row, generation, start + 1, pack_floats(targets), pack(targets), b"", b"")
                )
            if self.rows.decoding[row]:
                token = known[-1] % VOCABULARY if GARBAGE not in kv else VOCABULARY
                rows.append(row)
                drawn.append(token)
                if end < self.slots.shape[1]:
                    self.tokens[row, end] = token
                stops = token in self.rows.stops[row] and end - prompt >= sampling.min_tokens
                self.rows.idle[row] = stops or end + 1 >= self.rows.limit[row]
        return Result(
            header=header, rows=pack(rows), generations=pack(self.rows.generation[rows]), tokens=pack(drawn),
            logprobs=pack_floats(drawn), hints=bytes(len(rows)), prompts=prompts,
        )  # fmt: skip

    def _failure(self, header: Header, work: list[tuple[int, int, int]]) -> Failed:
        self.fails = False
        rows, starts, counts = (list(column) for column in zip(*work, strict=True))
        self.rows.idle[rows] = True
        return Failed(
            header=header, rows=pack(rows), generations=pack(self.rows.generation[rows]), starts=pack(starts),
            counts=pack(counts), error="boom",
        )  # fmt: skip


class Stand:
    """A scheduler and its worker; the core is checked after every call."""

    def __init__(
        self, rows: int = 4, slots: int = 100, max_length: int = 64, chunk_budget: int = 16, chunk_size: int = 16,
        prefix_cache: bool = True, policy: Policy | None = None, service: Service = DEFAULT,
        window: Window = NO_WINDOW, shares: Shares = WHOLE,
    ) -> None:  # fmt: skip
        limits = Limits(rows, slots, max_length, chunk_budget, chunk_size, prefix_cache, window)
        self.core = Scheduler(limits, policy or Conservative(), service, shares)
        self.worker = PlainWorker(self.core)

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.core.submit(request)
        check(self.core)

    def plan(self) -> Update | None:
        update = self.core.plan(0.0)
        if update is not None:
            self.worker.queue.append(update)
        check(self.core)
        return update

    def receive(self) -> bool:
        """Let the worker do one iteration and take its result; False where it had nothing to do."""
        message = self.worker.step()
        if isinstance(message, Failed):
            self.core.on_failed(message)
        elif message is not None:
            self.core.on_result(message)
        check(self.core)
        return message is not None

    def round(self) -> bool:
        """Plan once, iterate once."""
        self.plan()
        return self.receive()

    def finish(self, limit: int = 1000) -> int:
        """Play until everybody is done; rounds that it took. Then every slot must be free or cached."""
        rounds = 0
        while not self.core.idle or self.core.outstanding_chunks:
            self.round()
            rounds += 1
            assert rounds < limit, "requests hang"
        assert self.core.ledger.pool.free + self.core.ledger.index.total == self.core.limits.slots
        return rounds

    def die(self) -> list[Request]:
        lost = self.core.lose_worker()
        self.worker = PlainWorker(self.core)
        check(self.core)
        return lost


def chunks(update: Update) -> list[tuple[int, int, int]]:
    """(row, start, count) of an update's chunks."""
    columns = (update.chunk_rows, update.chunk_starts, update.chunk_counts)
    return list(zip(*(ints(column).tolist() for column in columns), strict=True))


def answered(*requests: Request) -> bool:
    """Every request has exactly the output that its prompt leads to."""
    for request in requests:
        expected = reply(request.prompt.tolist(), request.sampling.max_tokens)
        assert sink(request).ids == expected and sink(request).finish == Finish("length")
        assert request.state is State.FINISHED
    return True


def count_to(n: int, seed: int = 0) -> list[int]:
    """A prompt of n tokens."""
    return [(7 * i + seed) % VOCABULARY for i in range(n)]
