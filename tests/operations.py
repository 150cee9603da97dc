"""Random operations on the scheduler, with the integrity check after each.

    make operations      # a million of them

The worker computes nothing (tools/simulator.py); what rows hold, who may run and that everybody ends is what is looked
at. Iterations fail, workers die, readers outside the stream take loans, requests come in groups, with priorities and
keys, are aborted, paused and given up.
"""

import argparse
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from simulator import EOS, Chunk, Device

from aiollm.engine.integrity import check
from aiollm.engine.ledger import Limits, Loan
from aiollm.engine.pausing import PauseOrder
from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture
from aiollm.engine.queue import Order
from aiollm.engine.request import Finish, Request, State
from aiollm.engine.scheduler import Scheduler, Service
from aiollm.engine.share import Shares
from aiollm.engine.window import Window
from aiollm.wire.columns import pack
from aiollm.wire.messages import Failed, Result
from aiollm.wire.sampling import SamplingParams

LONGEST = 60
NAMESPACES = "", "", "", "\0salt", "a", "a\0salt", "b"
PATIENCE = 200.0  # of some requests, in operations


class Told:
    """A sink that sees that a request ends once, and after how much."""

    def __init__(self) -> None:
        self.output = 0
        self.finish: Finish | None = None

    def token(self, token: Any) -> None:
        assert self.finish is None, "a token after the end"

    def prompt_tokens(self, tokens: Any) -> None:
        pass

    def finished(self, finish: Finish) -> None:
        assert self.finish is None, "ended twice"
        self.finish = finish


class Worker(Device):
    """Remembers what each iteration was to compute, so that it can fail."""

    def launch(self, chunks: list[Chunk], recorded: Result | None = None) -> Any:
        decode = self.runnable()[0].tolist()
        self.work = [(row, int(self.stored[row]), 1) for row in decode] + chunks
        return super().launch(chunks, recorded)

    def length(self, request: Request) -> int:
        assert isinstance(request.sink, Told)
        return request.sink.output

    def fail(self, result: Result) -> Failed:
        rows, starts, counts = (list(column) for column in zip(*self.work, strict=True))
        self.decodes[rows] = False
        return Failed(
            header=result.header, rows=pack(rows), generations=pack(self.generation[rows]), starts=pack(starts),
            counts=pack(counts), error="boom",
        )  # fmt: skip


class Yard:
    """One seed's world."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        window, chunk_size = Window(r.choice([1, 2, 5, 20, 90]), r.choice([0, 0, 1, 3])), r.choice([3, 16, 64])
        budget = r.choice([4, 16, 64])
        slots = max(r.choice([LONGEST, 100, 250]), window.worst(LONGEST - 1, min(budget, chunk_size)))
        limits = Limits(r.choice([1, 2, 5, 9]), slots, LONGEST, budget, chunk_size, r.random() < 0.9, window)
        service = Service(
            r.choice(get_args(Order)), r.choice(get_args(PauseOrder)), r.choice([1.0, 50.0]), r.choice([0.0, 0.01]),
            r.choice([0.0, 400.0]),
        )  # fmt: skip
        self.core = Scheduler(limits, r.choice([Conservative, Aggressive, PastFuture, LightLLM])(), service)
        self.reshare()
        self.core.credit.step_seconds = r.choice([0.001, 0.1])
        self.faults, self.deaths = r.choice([0.0, 0.02]), r.choice([0.0, 0.002])
        self.systems = [[r.randrange(1, 4) for _ in range(r.randint(1, 25))] for _ in range(3)]
        self.worker = Worker(self.core, None)
        self.now = 0.0
        self.requests: list[Request] = []
        self.ended: list[Request] = []
        self.loans: list[Loan] = []
        self.flights: list[Result | Failed] = []
        self.acts = [self.plan] * 8 + [self.iterate] * 8 + [self.receive] * 8 + [self.submit] * 3 + [self.abort]
        self.acts += [self.pause, self.lend, self.settle, self.expire, self.die, self.reshare]

    def operate(self) -> None:
        """One operation, and a look at everything."""
        self.now += 1.0
        self.random.choice(self.acts)()
        check(self.core)

    def plan(self) -> None:
        update = self.core.plan(self.now)
        if update is not None:
            self.worker.send(update)

    def iterate(self) -> None:
        if len(self.flights) < 2 and (result := self.worker.run()) is not None:
            self.flights.append(self.worker.fail(result) if self.random.random() < self.faults else result)

    def receive(self) -> None:
        if self.flights:
            message = self.flights.pop(0)
            (self.core.on_failed if isinstance(message, Failed) else self.core.on_result)(message)  # type: ignore[arg-type]

    def submit(self) -> None:
        r = self.random
        if len(self.requests) > 25:
            self._sweep()
            return
        prompt = [*r.choice(self.systems)] if r.random() < 0.7 else []
        prompt += [r.randrange(1, 9) for _ in range(r.randint(0 if prompt else 1, 8))]
        most = self.core.limits.room + 1 - len(prompt)
        array, cap = np.array(prompt, np.int64), r.randint(1, most)
        group = []
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            told = Told()
            told.output = r.randint(1, cap)
            request = Request(
                "r", array, SamplingParams(max_tokens=cap, stop_ids=(EOS,)), told, self.now, r.choice(NAMESPACES),
                kind=r.randrange(2), priority=r.randrange(-3, 4), key=r.choice("abc"),
                patience=r.choice([None, None, PATIENCE]),
            )  # fmt: skip
            request.namespace = group[0].namespace if group else request.namespace
            group.append(request)
        self.requests += group
        self.core.submit(*group)

    def abort(self) -> None:
        if self.requests:
            self.core.abort(self.random.choice(self.requests))

    def pause(self) -> None:
        running = [request for request in self.requests if request.state is State.RUNNING]
        if running:
            self.core.pause(self.random.choice(running))

    def lend(self) -> None:
        if self.requests and len(self.loans) < 2:
            self.loans.append(self.core.ledger.lend("", self.random.choice(self.requests).tokens()))

    def settle(self) -> None:
        if self.loans:
            self.core.ledger.settle(self.loans.pop(0))

    def reshare(self) -> None:
        self.core.share(Shares(self.random.choice([0.1, 0.5, 1.0]), {"a": self.random.choice([0.2, 1.0])}))

    def expire(self) -> None:
        self.core.expire(self.now)

    def die(self) -> None:
        if self.random.random() < self.deaths * 50:
            self.core.lose_worker()
            self.worker = Worker(self.core, None)
            self.flights = self.flights[: self.random.randint(0, 1)]  # still in the pipe, of an epoch that is over

    def _sweep(self) -> None:
        self.ended += [request for request in self.requests if request.state is State.FINISHED]
        self.requests = [request for request in self.requests if request.state is not State.FINISHED]

    def finish(self) -> None:
        """Nothing new comes: everybody ends, and every slot is free or cached."""
        self.faults = self.deaths = 0.0
        for _ in range(20_000):
            self._sweep()
            if not self.requests and not self.core.outstanding_chunks and not self.flights:
                break
            self.now += 1.0
            for act in (self.plan, self.iterate, self.receive, self.settle, self.expire):
                act()
        else:
            raise AssertionError("requests hang")
        check(self.core)
        assert self.core.ledger.pool.free + self.core.ledger.index.total == self.core.limits.slots
        for request in self.ended:
            assert isinstance(request.sink, Told) and request.sink.finish is not None
            if request.sink.finish.reason in ("stop", "length"):
                assert len(request.output) == request.sink.output


def play(seed: int, operations: int) -> Yard:
    yard = Yard(seed)
    for _ in range(operations):
        yard.operate()
    yard.finish()
    return yard


def run(operations: int, first_seed: int = 0, each: int = 2000) -> dict[str, int]:
    """Worlds until so many operations were done."""
    totals = {"operations": 0, "worlds": 0, "requests": 0, "pauses": 0, "given_up": 0}
    while totals["operations"] < operations:
        seed = first_seed + totals["worlds"]
        try:
            yard = play(seed, min(each, operations))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        totals["operations"] += min(each, operations)
        totals["worlds"] += 1
        totals["requests"] += len(yard.ended)
        totals["pauses"] += yard.core.paused_total
        totals["given_up"] += sum(request.sink.finish.reason == "timeout" for request in yard.ended)  # type: ignore[union-attr, attr-defined]
        if totals["worlds"] % 50 == 0:
            print(totals, flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first world")
    parser.add_argument("--save", type=Path, help="write the totals as JSON")
    args = parser.parse_args()
    began = time.monotonic()
    totals = run(args.operations, args.seed)
    about = {
        "what": "random operations, integrity checked after each", **totals, "seconds": round(time.monotonic() - began),
        "python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(about))
    if args.save:
        args.save.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
