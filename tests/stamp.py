"""The stamp device: the real scheduler, loop, runner and decoder over an Ops table that stores stamps for KV.

Every slot holds (token, position). Attention checks each stamp it reads against the row's token history and returns a
hash of the tokens read; sampling turns that hash into the next token. So the right output of a request is a pure
function of its prompt (`oracle`), and one wrong slot anywhere changes it or breaks an assertion.

`Stage` interleaves server, two overlap threads, a device that completes launches late, clients, faults and restarts,
from one seed. `python tests/stamp.py --steps 1000000` runs it at length.
"""

import argparse
import json
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import torch
from overlap import LateThreads

from aiollm.engine.integrity import check
from aiollm.engine.ledger import Limits, Loan
from aiollm.engine.pausing import PauseOrder
from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture
from aiollm.engine.queue import Order
from aiollm.engine.request import Finish, PromptToken, Request, State, Token
from aiollm.engine.scheduler import Scheduler, Service
from aiollm.engine.slots import SlotPool
from aiollm.engine.window import Window
from aiollm.kernels.batch import Batch, Sampled, Sampling
from aiollm.kernels.ops import Ops
from aiollm.kernels.ref.inputs import inputs
from aiollm.kernels.ref.store import store
from aiollm.kernels.variants import Scoring
from aiollm.wire import messages
from aiollm.wire.columns import Ints, ints
from aiollm.wire.messages import Failed, FromWorker, Result, ToWorker
from aiollm.wire.sampling import AllowedIds, BannedWords, Grammar, SamplingParams
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers import state as worker_state
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decisions
from aiollm.workers.filters import Words
from aiollm.workers.flight import Flight, Outcome
from aiollm.workers.groups import Groups, lifetimes
from aiollm.workers.loop import BUILDING, Loop
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.model.parameters import parameters
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.runner import Begun, ModelRunner
from aiollm.workers.sizes import early, sizes
from aiollm.workers.staging import Staged, views
from aiollm.workers.step import Room, Step
from aiollm.workers.stream import Pending
from aiollm.workers.tp import TensorParallel
from aiollm.workers.windows import Windows

VOCABULARY = 17
EOS = 0
LONGEST = 28
CREDIT = 10  # slots ahead of a row, at most: a fiftieth of the largest pool, eight times over
POISON = -9  # token of a slot whose store failed; whatever is computed from it is poisoned too
ALL = range(VOCABULARY)
LETTERS = Vocabulary([b"", *(bytes([97 + id]) for id in range(VOCABULARY - 1))], special=[EOS], eos=[EOS])
PAIRS = Grammar("regex", "([a-e][f-p]){2,4}")
PRIME = 16777213  # hashes stay exact in a float32 logit
POWERS = np.array([pow(31, i, PRIME) for i in range(LONGEST + 1)], np.int64)


class StampError(BaseException):
    """The contract of the loop is broken. No Exception, so that no part of the server can take it for a client's."""


def spec_of(window: Window) -> DecoderSpec:
    """A layer for each group with a window, then one that sees everything."""
    return DecoderSpec(
        layers=window.each, hidden=1, heads=1, kv_heads=1, head_dim=2, intermediate=1, vocab=VOCABULARY,
        max_position=LONGEST, norm_eps=1e-6, rope=Rope(dim=2, theta=1e4), tied_head=False,
        window=window.tokens if window.groups else 0, global_layers=frozenset([window.groups]),
    )  # fmt: skip


def draw(hashed: int, seed: int, length: int, allowed: Sequence[int] = ALL) -> int:
    """The token at position `length` after a prefix with this hash; -1 where none is allowed."""
    return allowed[((hashed * 2654435761 + seed * 40503 + length) >> 7) % len(allowed)] if allowed else -1


def allowed(output: Sequence[int], sampling: SamplingParams) -> list[int]:
    """The ids that may follow what a request has put out."""
    ids = set(ALL)
    for constraint in sampling.constraints:
        match constraint:
            case AllowedIds(own):
                ids &= set(own)
            case BannedWords(sequences):
                ids -= {last for *before, last in sequences if [*output[max(0, len(output) - len(before)) :]] == before}
            case Grammar():  # PAIRS
                pairs, odd = divmod(len(output), 2)
                ids &= set(range(6, VOCABULARY)) if odd else set(range(1, 6)) if pairs < 4 else set()
                ids |= {EOS} if pairs >= 2 and not odd else set()
    if sampling.constraints and len(output) < sampling.min_tokens:
        ids = ids - {*sampling.stop_ids} or ids
    return sorted(ids)


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What a request must output, its stop token included."""
    tokens, hashed = list(prompt), sum((t + 1) * int(POWERS[i]) for i, t in enumerate(prompt)) % PRIME
    while len(tokens) < len(prompt) + sampling.max_tokens:
        token = draw(hashed, sampling.seed, len(tokens), allowed(tokens[len(prompt) :], sampling))
        tokens.append(token)
        if token in sampling.stop_ids:
            break
        hashed = (hashed + (token + 1) * int(POWERS[len(tokens) - 1])) % PRIME
    return tokens[len(prompt) :]


def stamp_ops(history: torch.Tensor) -> Ops:
    """`history` [rows, positions] is the token table that stamps are checked against.

    Layers with a window check what it shows, and pass tokens on; the one that sees everything makes the hash of them.
    """
    known = history.numpy()
    token_rows = np.empty(0, np.int64)

    def recorded(rows: torch.Tensor, *tables: torch.Tensor) -> Any:
        nonlocal token_rows
        token_rows = rows.numpy()
        return inputs(rows, *tables)

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **neighbours: Any) -> torch.Tensor:
        return x[:, :1].expand(-1, weight.shape[0])

    def rotary_store(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        positions, k_pool, v_pool, slots = rest[-4:]
        where = slots.numpy()
        owned = where[where != len(k_pool) - 1]  # the last one takes padding
        if len(np.unique(owned)) < len(owned):
            raise StampError("two tokens of one step share a slot")
        k_pool.numpy()[where, 0, 0] = k[:, 0, 0].numpy()
        v_pool.numpy()[where, 0, 0] = positions.numpy()
        return q

    def attention(q: Any, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scoring: Scoring) -> torch.Tensor:
        rows, lengths = batch.rows.numpy(), batch.lengths.numpy()
        at = np.arange(batch.max_length)
        mine = at < lengths[:, None]
        counts = np.diff(batch.starts.numpy())
        known_rows, low = rows, np.zeros(len(rows), np.int64)
        if scoring.window:  # sequences begin where it does
            mine &= at > (lengths - counts - scoring.window)[:, None]
            first = np.minimum(batch.starts.numpy()[:-1], len(token_rows) - 1)
            known_rows, low = token_rows[first], batch.positions.numpy()[first] + counts - lengths
        where = np.minimum(low[:, None] + at, LONGEST - 1)
        slots = batch.slot_table.numpy()[rows, : batch.max_length]
        tokens, positions = k_pool.numpy()[slots, 0, 0], v_pool.numpy()[slots, 0, 0]
        poisoned = (tokens == POISON) & mine
        if ((positions != where) & mine & ~poisoned).any():
            raise StampError("a slot holds another position")
        if ((tokens != known[known_rows[:, None], where]) & mine & ~poisoned).any():
            raise StampError("a slot holds another token")
        used = np.repeat(np.arange(len(rows)), counts)
        if poisoned.any():
            k_pool.numpy()[batch.slots.numpy()[: len(used)][poisoned.any(axis=1)[used]], 0, 0] = POISON
        if scoring.window:
            passed = q.clone()
            passed[: len(used)][torch.from_numpy(poisoned.any(axis=1)[used])] = POISON
            return passed
        hashes = np.cumsum((tokens + 1) * POWERS[: batch.max_length] * mine, axis=1) % PRIME
        sequence = np.zeros(len(q), np.int64)
        sequence[: len(used)] = used  # what comes behind is padding
        return torch.from_numpy(hashes[sequence, batch.positions.numpy()]).view(-1, 1, 1).expand(-1, 1, 2)

    def sample(logits: torch.Tensor, s: Sampling) -> Sampled:
        hashed, seeds, lengths = logits[:, 0].long().tolist(), s.seeds[s.rows].tolist(), s.lengths.tolist()
        lines = [int(s.masks[line, 0]) if line >= 0 else -1 for line in s.mask_lines.tolist()]
        ids = [[id for id in ALL if bits >> id & 1] for bits in lines]
        tokens = torch.tensor([draw(*row) for row in zip(hashed, seeds, lengths, ids, strict=True)])
        nothing = torch.empty(len(tokens), 0)
        return Sampled(tokens, torch.zeros(len(tokens)), nothing.long(), nothing)

    def logprobs(logits: torch.Tensor, targets: torch.Tensor, top_n: int) -> Any:
        none = targets.new_empty(len(targets), 0)
        return targets.float(), torch.ones_like(targets), none, none.float()

    return Ops(
        inputs=recorded,
        embedding=lambda ids, table: ids[:, None],
        norm=lambda x, by: x,
        add_norm=lambda x, residual, by: (x, residual),
        quantize=lambda weight: weight,
        linear=linear,
        gated_linear=lambda x, *rest: x[:, :1],
        rotary_store=rotary_store,
        plan=lambda batch, kv_heads: batch,
        attention=attention,
        gated=lambda x, activation: x[:, :1],
        sample=sample,
        logprobs=logprobs,
        store=store,
    )


class LateStream:
    """Completes launches in order, each only when told."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Pending, Callable[[], object]]] = deque()

    def launch(self, work: Callable[[], object]) -> Pending:
        pending = Pending()
        self.queue.append((pending, work))
        return pending

    def complete(self) -> Pending:
        pending, work = self.queue.popleft()
        pending.run(work)
        return pending


class NothingToDo(Exception):
    """The loop waits for its inbox, with the baton in hand."""


class Wire:
    """Both directions between server and worker; what was sent arrives when `deliver` says so."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self.arrived: deque[bytes] = deque()
        self.posted: list[bytes] = []
        self.results: deque[bytes] = deque()

    def send(self, message: ToWorker) -> None:
        self.sent.append(messages.encoder.encode(message))

    def deliver(self) -> None:
        self.arrived.append(self.sent.popleft())

    def drain(self) -> Iterable[ToWorker]:
        while self.arrived:
            yield messages.to_worker_decoder.decode(self.arrived.popleft())

    def quiet(self, seconds: float) -> bool:
        if seconds == BUILDING and not self.arrived:
            raise NothingToDo
        return not self.arrived

    def wait(self) -> bool:
        raise NothingToDo

    def put(self, message: FromWorker) -> None:
        self.posted.append(messages.encoder.encode(message))

    def offer(self) -> None:
        self.flush()

    def flush(self) -> None:
        self.results += self.posted
        self.posted = []


class FullConstraints(Constraints):
    """Lexers are full now and then, though never twice before the same token, and rows are spread over several."""

    lasting = 1

    def __init__(self, threads: Executor, random: random.Random) -> None:
        super().__init__(LETTERS, VOCABULARY, threads, spares=threads, side_by_side=random.choice([1, 2, 3]))
        self._lexers.each = random.choice([1, 2])
        self.random = random
        self.chance = random.choice([0.0, 0.02, 0.2])

    def _narrow(self, rows: dict[int, int], lines: Words, failures: dict[int, str]) -> dict[int, str]:
        full = super()._narrow(rows, lines, failures)
        for at, index in rows.items():
            row = self._rows[index]
            if row.grammar is not None and row.renewed != len(row.tokens) and self.random.random() < self.chance:
                full[at] = "injected"
        return full


class FaultyRunner:
    """Runs a step, or fails at random and poisons what it should have stored. Contract breaches are no faults."""

    def __init__(self, runner: ModelRunner, groups: Groups, chance: float, random: random.Random) -> None:
        self.runner = runner
        self.groups = groups
        self.chance = chance
        self.random = random
        self.breach: StampError | None = None

    def room(self, needs: Room, mixed: bool, top_n: int) -> Room:
        return self.runner.room(needs, mixed, top_n)

    @property
    def prepares(self) -> bool:
        return self.runner.prepares

    def prepare(self) -> None:
        self.runner.prepare()

    def run(self, step: Step) -> Outcome:
        return self.finish(step, self.begin(step), None)

    def begin(self, step: Step) -> Begun:
        if self.random.random() < self.chance:
            state = self.runner.state
            columns = views(step.staged.buffer, step.staged.places)
            state.upload(len(step.updates), columns)
            windows = state.windows.tables
            for (pool, _), (group, _) in zip(self.runner.kv, self.groups.places, strict=True):
                table = windows[group - 1] if group else state.slot_table
                pool[table[columns["token_rows"], columns["positions"] % table.shape[1]].long(), 0, 0] = POISON
            raise RuntimeError("injected")
        try:
            return self.runner.begin(step)
        except StampError as breach:
            self.breach = breach
            raise

    def finish(self, step: Step, begun: Begun, masks: Staged | None) -> Outcome:
        return self.runner.finish(step, begun, masks)


class Worker:
    """A worker process without a process: real loop, state, runner and decoder; two threads as a pair of turns."""

    def __init__(self, epoch: int, limits: Limits, chance: float, random: random.Random) -> None:
        self.wire = Wire()
        self.stream = LateStream()
        graphs = random.choice(["none", "some", "all"])
        spec = spec_of(limits.window)
        groups = lifetimes(spec)
        assert groups.each == limits.window.each
        window, cpu = limits.window, torch.device("cpu")
        columns = window.tokens + max(min(limits.chunk_budget, limits.chunk_size), CREDIT) + 2
        windows = Windows(window.groups, window.tokens, limits.rows, columns, cpu)
        state = worker_state.State(limits.rows, LONGEST, cpu, windows, VOCABULARY)
        ops = stamp_ops(state.tokens)
        weights = {p.name: torch.zeros(p.shape, dtype=torch.int64) for p in parameters(spec, 0, 1)}
        pool = torch.full((limits.slots + 1, 1, 2), -7, dtype=torch.int64)
        self.groups = [group for group, _ in groups.places]
        self.pools = [(pool, pool.clone())] * spec.layers
        state.pad_into(limits.slots)
        tp = TensorParallel()
        decoder = Decoder(spec, weights, ops, tp, self.groups)
        runner = ModelRunner(decoder, self.pools, state, ops, tp, limits.chunk_budget)
        if graphs != "none":
            every = sizes(limits.rows, limits.chunk_budget)
            runner.graphs.begin(lambda work: work, every)  # a "graph" that computes again on the places of its capture
            for size in early(every) if graphs == "some" else every:
                runner.graphs.capture(size)
        self.runner = FaultyRunner(runner, groups, chance, random)
        self.threads = LateThreads()
        self.loop = Loop(
            epoch, limits.rows, self.wire, self.wire, self.stream, self.runner, runner.staging, Decisions(),
            FullConstraints(self.threads, random), runner.mask_staging,
        )  # fmt: skip
        self.flights: list[Flight | None] = [None, None]
        self.turn = 0
        self.steps = 0
        self.hinted: dict[tuple[int, int], int] = {}

    def ready(self) -> bool:
        """The thread whose turn it is does not wait for the device."""
        flight = self.flights[self.turn]
        return flight is None or flight.pending.done

    def take_turn(self) -> None:
        """What the overlap thread does between taking and passing the baton."""
        flight, self.flights[self.turn] = self.flights[self.turn], None
        before = len(self.wire.results)
        try:
            launched = self.loop.turn(flight)
            self.wire.flush()
        except NothingToDo:
            return  # with the baton: nobody flushes until a message arrives
        finally:
            self._note_hints(list(self.wire.results)[before:])
        if launched is not None:
            self.steps += 1
            for key in zip(launched.rows.tolist(), launched.generations.tolist(), strict=True):
                if launched.iteration > self.hinted.get(key, launched.iteration) + 1:
                    raise StampError("a row was launched long after it had stopped")
        self.flights[self.turn] = launched
        self.turn = 1 - self.turn

    def _note_hints(self, results: list[bytes]) -> None:
        for body in results:
            message = messages.from_worker_decoder.decode(body)
            if isinstance(message, Result):
                keys = zip(ints(message.rows).tolist(), ints(message.generations).tolist(), strict=True)
                for key, hint in zip(keys, message.hints, strict=True):
                    if hint:
                        self.hinted[key] = message.header.iteration


class Client:
    """A sink that knows what must come."""

    def __init__(self, prompt: list[int], sampling: SamplingParams) -> None:
        self.expected = oracle(prompt, sampling)
        self.prompt = prompt
        self.got: list[int] = []
        self.finish: Finish | None = None
        self.prompt_seen: list[int] = []

    def token(self, token: Token) -> str | None:
        if self.finish is not None:
            raise StampError("a token after the end")
        self.got.append(token.id)
        if self.got != self.expected[: len(self.got)]:
            raise StampError(f"token {len(self.got)} is {token.id}, not {self.expected[len(self.got) - 1]}")
        return None

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        self.prompt_seen += [int(token.logprob) for token in tokens]
        if self.prompt_seen != self.prompt[1 : 1 + len(self.prompt_seen)]:
            raise StampError("prompt logprobs of other tokens")

    def finished(self, finish: Finish) -> None:
        if self.finish is not None:
            raise StampError("ended twice")
        self.finish = finish
        if any(word in finish.error for word in ("constraints", "Parser", "finite", "complex")):
            raise StampError(f"ended by {finish.error} after {self.got} of {self.expected}")
        if finish.reason in ("stop", "length") and self.got != self.expected:
            raise StampError(f"ended by {finish.reason} with {self.got} of {self.expected}")


class HastyPool(SlotPool):
    """Gives away first what was freed last: the worst for whoever still uses it."""

    def take(self, count: int) -> Ints:
        self._sorted = np.concatenate([self._given[: self._count][::-1], self._sorted[self._at :]])
        self._at = self._count = 0
        return super().take(count)


class HastyScheduler(Scheduler):
    def begin_epoch(self) -> None:
        super().begin_epoch()
        self.ledger.pool = HastyPool(self.limits.slots)


POLICIES = (Aggressive, Aggressive, Aggressive, Conservative, PastFuture, LightLLM)


def service(r: random.Random) -> Service:
    """Any order, any targets."""
    return Service(
        order=r.choice(get_args(Order)), pause_order=r.choice(get_args(PauseOrder)), ttft_target=r.random(),
        gap_target=r.choice([0.0, 0.02]),
    )  # fmt: skip


class Stage:
    """One seed's world. `step` lets one randomly chosen actor act; `settle` lets everything finish."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        window = Window(r.choice([1, 2, 5, 11, 20]), r.choice([0, 0, 1, 3]))
        chunk_size, budget = r.choice([2, 5, 16, 40]), r.choice([3, 7, 16, 40])
        self.limits = Limits(
            rows=r.choice([1, 2, 4, 6]),
            slots=max(r.choice([LONGEST, 34, 40, 64]), window.worst(LONGEST - 1, min(budget, chunk_size))),
            max_length=LONGEST,
            chunk_budget=budget,
            chunk_size=chunk_size,
            prefix_cache=r.random() < 0.5,
            window=window,
        )
        self.faults = r.choice([0.0, 0.0, 0.01, 0.05])
        self.deaths = r.choice([0.0, 0.0005])
        self.core = HastyScheduler(self.limits, POLICIES[r.randrange(len(POLICIES))](), service(r))
        self.constrained = r.random() < 0.7
        self.core.credit.step_seconds = r.choice([0.001, 0.02, 0.1])
        self.alphabet = r.choice([2, 3, VOCABULARY])
        self.systems = [[r.randrange(self.alphabet) for _ in range(r.randint(1, 12))] for _ in range(3)]
        self.clients: list[Request] = []
        self.loans: list[tuple[Loan, list[int], Any]] = []
        self.worker = self._spawn()
        self.steps = 0
        self.finished = 0
        self.late: deque[bytes] = deque()  # results of a worker that died, still in the pipe
        self.actors: list[tuple[Callable[[], None], int]] = [
            (self.deliver, 8), (self.turn, 10), (self.complete, 8), (self.receive, 8), (self.plan, 6),
            (self.submit, 3), (self.abort, 1), (self.pause, 1), (self.lend, 1), (self.copy_out, 2), (self.die, 1),
            (self.build, 1),
        ]  # fmt: skip
        self.choices = [actor for actor, weight in self.actors for _ in range(weight)]

    def _spawn(self) -> Worker:
        return Worker(self.core.epoch, self.limits, self.faults, self.random)

    def step(self) -> None:
        self.random.choice(self.choices)()
        if self.random.random() < 0.05:
            check(self.core)

    # The actors

    def plan(self) -> None:
        update = self.core.plan(0.0)
        if update is not None:
            self.worker.wire.send(update)

    def deliver(self) -> None:
        if self.worker.wire.sent:
            self.worker.wire.deliver()

    def complete(self) -> None:
        if self.worker.stream.queue:
            pending = self.worker.stream.complete()
            if self.worker.runner.breach is not None:
                raise self.worker.runner.breach
            if pending.error is not None and str(pending.error) != "injected":
                raise pending.error

    def build(self) -> None:
        self.worker.threads.complete()

    def turn(self) -> None:
        if self.worker.ready():
            self.worker.take_turn()
            self.steps += self.worker.steps
            self.worker.steps = 0

    def receive(self) -> None:
        body = self.late.popleft() if self.late else None
        if body is None and self.worker.wire.results:
            body = self.worker.wire.results.popleft()
        if body is not None:
            message = messages.from_worker_decoder.decode(body)
            if isinstance(message, Result):
                self.core.on_result(message)
            elif isinstance(message, Failed):
                self.core.on_failed(message)

    def submit(self) -> None:
        r = self.random
        if len(self.clients) >= 12:
            return
        prompt = [*r.choice(self.systems)] if r.random() < 0.7 else []
        prompt += [r.randrange(self.alphabet) for _ in range(r.randint(0 if prompt else 1, 8))]
        room = self.limits.longest - len(prompt)
        sampling = SamplingParams(
            max_tokens=r.randint(1, room) if room > 1 else 1,
            seed=r.randrange(3),
            stop_ids=(EOS,) if r.random() < 0.7 else (),
            prompt_logprobs=0 if r.random() < 0.1 else -1,
        )
        if self.constrained and r.random() < 0.5:
            sampling = self.constrain(sampling)
        request = Request("r", np.array(prompt, np.int64), sampling, Client(prompt, sampling), self.random.random())
        request.priority, request.key = r.randrange(-2, 3), r.choice("ab")
        requests = [request]
        if r.random() < 0.1:  # choices of one prompt
            for seed in (3, 4):
                another = msgspec.structs.replace(sampling, seed=seed)
                requests.append(Request("r", request.prompt, another, Client(prompt, another), request.arrived))
        self.clients += requests
        self.core.submit(*requests)

    def constrain(self, sampling: SamplingParams) -> SamplingParams:
        """The same with constraints, none of which leaves a request without a token."""
        r = self.random
        banned = BannedWords(tuple(tuple(r.choices(range(6, VOCABULARY), k=r.randint(1, 3))) for _ in range(4)))
        other = AllowedIds(tuple(r.sample(range(1, 6), 3))) if r.random() < 0.5 else PAIRS
        constraints = r.choice([(other,), (banned,), (banned, other)])
        return msgspec.structs.replace(sampling, constraints=constraints, stop_ids=(EOS,), min_tokens=r.randint(0, 5))

    def abort(self) -> None:
        if self.clients and self.random.random() < 0.5:
            self.core.abort(self.random.choice(self.clients))
            self._sweep()

    def pause(self) -> None:
        running = [request for request in self.clients if request.state is State.RUNNING]
        if running and self.random.random() < 0.5:
            self.core.pause(self.random.choice(running))

    def lend(self) -> None:
        """A reader outside the stream takes a loan (rule F)."""
        if self.clients and len(self.loans) < 2:
            tokens = self.random.choice(self.clients).tokens()
            self.loans.append((self.core.ledger.lend("", tokens), tokens.tolist(), self.worker))

    def copy_out(self) -> None:
        """That reader reads, at a time of its own, and settles."""
        if self.loans:
            loan, tokens, worker = self.loans.pop(0)
            if loan.epoch == self.core.epoch:
                for (k_pool, v_pool), group in zip(worker.pools, worker.groups, strict=True):
                    begin = max(0, loan.node.end - self.limits.window.behind) if group else 0
                    slots = loan.slots[group, begin:]
                    if k_pool.numpy()[slots, 0, 0].tolist() != tokens[begin : loan.node.end]:
                        raise StampError("a reader outside the stream found other tokens")
                    if v_pool.numpy()[slots, 0, 0].tolist() != list(range(begin, loan.node.end)):
                        raise StampError("a reader outside the stream found other positions")
            self.core.ledger.settle(loan)

    def die(self) -> None:
        """kill -9: some results are still in the pipe, and may arrive after the new worker was started."""
        if self.random.random() < self.deaths * 40:
            self.late = deque(list(self.worker.wire.results)[: self.random.randint(0, 3)])
            self.core.lose_worker()
            self.worker = self._spawn()
            self._sweep()

    def _sweep(self) -> None:
        ended = [request for request in self.clients if request.state is State.FINISHED]
        for request in ended:
            assert isinstance(request.sink, Client) and request.sink.finish is not None
        self.finished += len(ended)
        self.clients = [request for request in self.clients if request.state is not State.FINISHED]

    def settle(self) -> None:
        """Nothing new arrives; everything must end, and every slot must come back."""
        for _ in range(4000):
            self._sweep()
            if (
                not self.clients
                and not self.loans
                and not self.worker.stream.queue
                and not self.core.outstanding_chunks
            ):
                break
            for actor in (self.plan, self.deliver, self.turn, self.complete, self.receive, self.copy_out, self.build):
                actor()
        else:
            raise StampError("requests hang")
        check(self.core)
        assert self.core.ledger.pool.free + self.core.ledger.index.total == self.limits.slots, "slots are missing"


def play(seed: int, actions: int) -> Stage:
    """One world: `actions` random actions, then the end of everything."""
    stage = Stage(seed)
    sweep = stage._sweep
    for at in range(actions):
        stage.step()
        if at % 16 == 0:
            sweep()
    stage.settle()
    return stage


class Totals(msgspec.Struct):
    steps: int = 0
    requests: int = 0
    pauses: int = 0
    worlds: int = 0
    seconds: float = 0.0


def run(steps: int, first_seed: int = 0, actions: int = 3000, report: Callable[[Totals], None] | None = None) -> Totals:
    """Play worlds until the loops have launched `steps` iterations in all."""
    totals, began = Totals(), time.monotonic()
    torch.set_num_threads(1)
    while totals.steps < steps:
        seed = first_seed + totals.worlds
        try:
            stage = play(seed, actions)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        totals.worlds += 1
        totals.steps += stage.steps
        totals.requests += stage.finished
        totals.pauses += stage.core.paused_total
        totals.seconds = round(time.monotonic() - began, 1)
        if report is not None:
            report(totals)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description="random steps of the real engine and loop on the stamp device")
    parser.add_argument("--steps", type=int, default=1_000_000, help="iterations launched by the loops")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first world")
    parser.add_argument("--save", type=Path, help="write the totals as JSON")
    args = parser.parse_args()

    def report(totals: Totals) -> None:
        if totals.worlds % 100 == 0:
            print(
                f"{totals.steps} steps, {totals.worlds} worlds, {totals.requests} requests, {totals.seconds} s",
                flush=True,
            )

    totals = run(args.steps, args.seed, report=report)
    result = {
        "what": "stamp device",
        **msgspec.to_builtins(totals),
        "first_seed": args.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result))
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
