"""What scheduling costs, without a model: a round of the scheduler by rows, and the prefix cache beside a plain table.

    python tools/bench_engine.py [--save tools/results/bench_engine.json]

`plan` is a round with nothing to do, `credit` one in which every row is topped up, `refuse` one that looks at all rows
and turns the next request down, `both` does both, `admit` is one admission; `result` takes an iteration's tokens. The
growth is the exponent between the smallest and the largest number of rows: 1 is linear.

The table is what engines with pages have: a dict from the hash of each block of 16 tokens, chained with the block
before, to its slots. Both hold the same prompts, and are asked and told the same.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aiollm.engine.admission import Foresight, View
from aiollm.engine.ledger import Limits
from aiollm.engine.policy import PastFuture
from aiollm.engine.radix import RadixIndex
from aiollm.engine.request import Finish, PromptToken, Request, Token
from aiollm.engine.scheduler import Scheduler
from aiollm.wire.columns import pack, pack_floats
from aiollm.wire.messages import Header, Result
from aiollm.wire.sampling import SamplingParams

ROWS = (16, 64, 256, 1000, 4096)
PROMPT, ROUNDS = 200, 100
BLOCK = 16
KINDS = ("plan", "credit", "refuse", "both", "admit", "result")
NODES, HEADS, HEAD, PART = 100_000, 500, 100, 10


class Nobody:
    """A sink that keeps nothing."""

    def token(self, token: Token) -> None:
        pass

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        pass

    def finished(self, finish: Finish) -> None:
        pass


class Full(PastFuture):
    """Looks at everybody, and finds no slot that is left."""

    def open(self, view: View) -> Foresight:
        return super().open(view._replace(slots=0))


def timed(call: Callable[[], object]) -> float:
    """Microseconds of this thread's CPU: others on the machine do not count."""
    began = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - began) * 1e-3


def request(random: np.random.Generator, length: int, max_tokens: int = 2000) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, stop_ids=(0,))
    return Request("r", random.integers(1, 50_000, length), sampling, Nobody())


def scheduler(rows: int) -> dict[str, Any]:
    """Median microseconds of each kind of round with so many rows that decode."""
    random = np.random.default_rng(0)
    policy = PastFuture()
    for length in random.integers(100, 800, 1000).tolist():
        policy.history.add(None, length)
    core = Scheduler(Limits(rows + 1, rows * 1500, 4096, 8192, 8192), policy)
    core.submit(*(request(random, PROMPT) for _ in range(rows)))
    admitting = []
    iteration = 0

    def result() -> Result:
        nonlocal iteration
        iteration += 1
        index = [row.index for row in core.ledger.running.values() if row.decodes]
        generations = [core.ledger.running[at].generation for at in index]
        return Result(
            header=Header(1, iteration, iteration, core.ledger.number, 30_000, 0, b""), rows=pack(index),
            generations=pack(generations), tokens=pack([7] * len(index)), logprobs=pack_floats([0.0] * len(index)),
            hints=bytes(len(index)),
        )  # fmt: skip

    while core.waiting or core.ledger.coming:
        before = len(core.ledger.running)
        spent = timed(lambda: core.plan(0.0))
        if len(core.ledger.running) > before:
            admitting.append(spent / (len(core.ledger.running) - before))
        core.on_result(result())
    core.policy = core.door.policy = full = Full()
    full.history = policy.history
    core.submit(request(random, PROMPT))
    times: dict[str, list[float]] = {"plan": [], "credit": [], "refuse": [], "both": [], "result": []}
    for _ in range(ROUNDS):
        message = result()
        times["result"].append(timed(lambda message=message: core.on_result(message)))
        granted, looks = int(core.ledger.table.granted.sum()), bool(random.integers(2))
        core.door._refused = None
        if not looks:
            head, ledger = core.waiting.head(0.0), core.ledger
            core.door._refused = head, ledger.retired, ledger.iterations  # type: ignore[assignment]
        spent = timed(lambda: core.plan(0.0))
        topped = int(core.ledger.table.granted.sum()) - granted >= rows
        times["both" if topped and looks else "credit" if topped else "refuse" if looks else "plan"].append(spent)
    return {
        "rows": rows, "admit_us": round(statistics.median(admitting), 1),
        **{f"{name}_us": round(statistics.median(values), 1) for name, values in times.items() if values},
    }  # fmt: skip


class Blocks:
    """Cached blocks by their hash, the oldest first; a prompt's last, incomplete block is not kept."""

    def __init__(self) -> None:
        self.table: dict[int, np.ndarray] = {}

    def peek(self, tokens: np.ndarray) -> int:
        parent, count = 0, 0
        for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
            parent = hash((parent, tokens[at : at + BLOCK].tobytes()))
            if parent not in self.table:
                break
            count += BLOCK
        return count

    def insert(self, tokens: np.ndarray, slots: np.ndarray) -> None:
        parent = 0
        for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
            parent = hash((parent, tokens[at : at + BLOCK].tobytes()))
            if parent not in self.table:
                self.table[parent] = slots[at : at + BLOCK].copy()


def prompts(random: np.random.Generator) -> list[np.ndarray]:
    """As many as make 1,000,000 cached tokens in 100,000 nodes: beginnings, and parts that go on from them."""
    heads = [random.integers(1, 50_000, HEAD) for _ in range(HEADS)]
    parts = [random.integers(1, 50_000, PART) for _ in range(NODES - HEADS)]
    return [np.concatenate([heads[int(random.integers(HEADS))], part]) for part in parts]


def index() -> dict[str, Any]:
    """Median and 99th percentile of peek plus insert, in microseconds, for prompts of several lengths."""
    random = np.random.default_rng(0)
    tree, blocks = RadixIndex(), Blocks()
    root = tree.root("")
    for at, tokens in enumerate(prompts(random)):
        node, found = tree.match(root, tokens)
        slots = np.arange(at * PART, at * PART + len(tokens), dtype=np.int32)
        if len(found) < len(tokens):
            tree.extend(node, tokens[len(found) :], slots[len(found) :])
        blocks.insert(tokens, slots)
    known = prompts(np.random.default_rng(0))
    rows = []
    for length in (128, 512, 2048, 8192):
        samples: dict[str, list[float]] = {"radix": [], "blocks": []}
        for _ in range(300):
            head = known[int(random.integers(len(known)))]
            tokens = np.concatenate([head, random.integers(1, 50_000, length - len(head))])
            slots = np.arange(length, dtype=np.int32)

            def radix(tokens: np.ndarray = tokens, slots: np.ndarray = slots) -> None:
                tree.peek(root, tokens)
                node, found = tree.match(root, tokens)
                tree.pin(node)
                added = tree.extend(node, tokens[len(found) :], slots[len(found) :])
                assert added is not None
                tree.pin(added, above=node)
                tree.unpin(added)

            def paged(tokens: np.ndarray = tokens, slots: np.ndarray = slots) -> None:
                blocks.peek(tokens)
                blocks.insert(tokens, slots)

            samples["radix"].append(timed(radix))
            samples["blocks"].append(timed(paged))
        for name, values in samples.items():
            p50, p99 = np.percentile(values, [50, 99])
            rows.append({"index": name, "prompt": length, "p50_us": round(p50, 1), "p99_us": round(p99, 1)})
    evicted = [timed(lambda: tree.evict(1000)) for _ in range(200)]
    return {
        "tokens": tree.total, "nodes": tree.nodes, "peek_and_insert": rows,
        "evict_1000_us": round(statistics.median(evicted), 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    gc.collect()
    gc.freeze()
    print(f"{'rows, us':>8}" + "".join(f"{name:>10}" for name in KINDS))
    scheduler(ROWS[0])  # whatever is imported or built at first use
    rows = []
    for count in ROWS:
        rows.append(scheduler(count))
        row = rows[-1]
        print(f"{count:>8}" + "".join(f"{row[f'{name}_us']:>10}" for name in KINDS))
    span = np.log(ROWS[-1] / ROWS[0])
    growth = {
        name: round(float(np.log(rows[-1][name] / rows[0][name]) / span), 2) for name in rows[0] if name != "rows"
    }  # fmt: skip
    print("growth", growth)
    found = index()
    print(
        f"index of {found['tokens']:,} tokens in {found['nodes']:,} nodes; 1,000 evicted in {found['evict_1000_us']} us"
    )
    for row in found["peek_and_insert"]:
        print(f"{row['index']:<8}{row['prompt']:>6} tokens: p50 {row['p50_us']:>8} us  p99 {row['p99_us']:>8} us")
    if args.save:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                 "python": platform.python_version(), "numpy": np.__version__}  # fmt: skip
        document = {**about, "scheduler": rows, "growth": growth, "index": found}
        args.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
