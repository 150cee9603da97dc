"""The real scheduler, radix index and slot pool on a simulated device: policies side by side, no GPU.

    python tools/simulate.py artifact            the paper's three workloads, as its published simulator counts them
    python tools/simulate.py serve               the same and others in the time of a real GPU: goodput, TTFT, gaps
    python tools/simulate.py fit FILE            the cost model, from what --record kept or bench static saved

In the artifact's accounting an iteration is one step whatever it computes, and prompts, those of paused requests too,
are computed for nothing. In the other one an iteration takes the time that the cost model says, prompts are computed in
chunks beside decoding rows, and whoever was paused pays for what left the cache meanwhile.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import costs as costing
import numpy as np
import report
import workloads
from simulator import EVEN, Agreement, Ask, Client, Uneven, World

from aiollm.engine.admission import Foresight, View
from aiollm.engine.ledger import Limits
from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture, Policy
from aiollm.engine.scheduler import Scheduler, Service

POOL = workloads.ARTIFACT_POOL
# Steps, share of memory in use and share of evicted requests, in per cent, that the artifact's own simulator gives.
PUBLISHED = {
    "decode-heavy": {"optimum": (294_830, 94.5, 0.0), "past-future": (298_800, 93.3, 8.9),
                     "conservative": (487_460, 57.8, 0.0), "aggressive": (281_660, 98.4, 94.6)},
    "balanced": {"optimum": (647_840, 93.0, 0.0), "past-future": (652_930, 91.8, 6.7),
                 "conservative": (839_930, 71.8, 0.0), "aggressive": (621_110, 97.9, 94.2)},
    "prefill-heavy": {"optimum": (233_990, 96.7, 0.0), "past-future": (242_370, 94.6, 3.0),
                      "conservative": (385_240, 59.9, 0.0), "aggressive": (230_570, 98.1, 34.5)},
}  # fmt: skip


class Optimum(Conservative):
    """The peak formula where max_tokens is what nobody can know, the length that each output will have."""

    def open(self, view: View) -> Foresight:  # type: ignore[override]
        return Foresight(view, view.cap[None], 0.0, lambda new: np.array([new.cap]))


POLICIES: dict[str, Callable[[], Policy]] = {
    "optimum": Optimum,
    "past-future": PastFuture,
    "conservative": Conservative,
    "aggressive": Aggressive,
    "lightllm": LightLLM,
}


def artifact(workload: str, policy: str, requests: int = 3000, seed: int = 0) -> dict[str, Any]:
    """One run in the artifact's accounting: it ends when the last request has begun."""
    asks: Iterator[Ask] = workloads.uniform(workload, seed, most=requests)
    if policy == "optimum":
        asks = (ask._replace(max_tokens=ask.output) for ask in asks)
    core = Scheduler(Limits(512, POOL, 12_000, 32_768, 32_768), POLICIES[policy](), Service(order="fcfs"))
    core.credit.step_seconds = 1.0
    world = World(core, asks, backlog=1, overlap=1)
    began = time.monotonic()
    world.play(stop=lambda: world.exhausted and not core.waiting)
    finished = sum(client.finish is not None for client in world.clients)
    published = PUBLISHED[workload].get(policy)
    return {
        "workload": workload, "policy": policy, "requests": requests, "steps": world.iterations,
        "memory": 100 * float(np.mean(world.memory)) / POOL, "evicted": 100 * core.paused_total / max(1, finished),
        "published": "{:,} / {} / {}".format(*published) if published and requests == 3000 else None,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


SETUP: dict[str, Any] = {
    "costs": "qwen3-8b-h100", "clients": 100, "pool": POOL, "rows": 512, "chunk": 2048, "cap": workloads.CAP,
    "warm_up": 60.0, "window": 90.0, "order": "fair", "pause_order": "fcfs", "gap_target": 1.5, "lengths": None,
    "seed": 0, "impatient": False, "scale": 1,
}  # fmt: skip


def serve(workload: str, policy: str, setup: dict[str, Any], uneven: Uneven = EVEN, seed: int = 0) -> dict[str, Any]:
    """One run in the time of a real device: closed loops of clients unless the workload has times of its own. `seed` is
    that of the device's scatter."""
    costs = costing.load(setup["costs"])
    limits = Limits(setup["rows"], setup["pool"], 24_000, setup["chunk"], setup["chunk"])
    service = Service(order=setup["order"], pause_order=setup["pause_order"], gap_target=setup["gap_target"])
    core = Scheduler(limits, POLICIES[policy](), service)
    agreement = Agreement(impatient=setup["impatient"])
    asks, clients, warm = asks_of(workload, setup), setup["clients"], setup["warm_up"]
    if workload in ("bursts", "chats"):  # have times of their own, from the beginning on
        clients, warm = 0, 0.0
    until = setup["warm_up"] + setup["window"]
    if policy == "optimum":
        asks = (ask._replace(max_tokens=ask.output) for ask in asks)
    world = World(core, asks, costs, clients=clients, agreement=agreement, uneven=uneven, seed=seed)
    if workload == "chats":
        conversations = workloads.chats(setup["seed"], setup["cap"])
        if policy == "optimum":
            conversations = [[ask._replace(max_tokens=ask.output) for ask in asks] for asks in conversations]
        follow_up(world, conversations)
    began = time.monotonic()
    world.play(warm)
    start = len(world.memory)
    world.play(until)
    inside = [client for client in world.ended if client.first >= 0 and warm <= client.last <= until]
    kept = [client for client in inside if agreement.kept(client)]
    tokens = sum(len(client.request.output) for client in inside)
    span = min(world.now, until) - warm
    first = [client.first - client.arrived for client in world.clients if client.first >= warm]
    gaps = [client.gap for client in inside if len(client.request.output) > 1]
    ended = max(1, sum(client.finish is not None and client.first >= 0 for client in world.clients))
    return {
        "workload": workload, "policy": policy, "iterations": world.iterations,
        "memory": 100 * float(np.mean(world.memory[start:] or [0])) / limits.slots,
        "evicted": 100 * core.paused_total / ended,
        "goodput": sum(len(client.request.output) for client in kept) / span,
        "tokens_per_second": tokens / span,
        "answers": len(inside), "good": len(kept), "lost": sum(client.first < 0 for client in world.ended),
        "broken": 100 * (1 - len(kept) / max(1, len(inside))),
        "ttft_p50": report.percentile(first, 50), "ttft_p99": report.percentile(first, 99),
        "gap_p50": report.percentile(gaps, 50), "gap_p99": report.percentile(gaps, 99),
        "cached": 100 * core.found_total / max(1, core.asked_total), "computed": world.device.computed,
        "drifts": core.policy.history.drifts, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def asks_of(workload: str, setup: dict[str, Any]) -> Iterator[Ask]:
    """What is asked of the server, none of it where conversations come by themselves."""
    asks = _asks(workload, setup)
    return workloads.scaled(asks, setup["scale"]) if setup["scale"] > 1 else asks


def _asks(workload: str, setup: dict[str, Any]) -> Iterator[Ask]:
    seed, cap = setup["seed"], setup["cap"]
    if workload in workloads.UNIFORM:
        return workloads.uniform(workload, seed, cap)
    if workload == "sharegpt":
        return workloads.sharegpt(Path(setup["lengths"]), seed, cap)
    if workload == "chats":
        return iter(())
    made: dict[str, Callable[..., Iterator[Ask]]] = {
        "reasoning": workloads.reasoning, "thinking": lambda seed, _: workloads.thinking(seed),
        "drift": workloads.drift, "bursts": workloads.bursts,
    }  # fmt: skip
    return made[workload](seed, cap)


def follow_up(world: World, conversations: list[list[Ask]]) -> None:
    """Ask the next turn a second after the answer, behind all that was said."""
    for asks in conversations:
        world.ask(asks[0])

    def on_end(client: Client) -> None:
        rest = conversations[client.ask.chat]
        rest.pop(0)
        if rest and client.finish is not None and client.finish.reason in ("stop", "length"):
            prompt = np.concatenate([client.request.tokens()[:-1], rest[0].prompt])
            rest[0] = rest[0]._replace(prompt=prompt, at=world.now + 1.0)
            world.ask(rest[0])

    world.on_end = on_end


EVERYTHING = (*workloads.UNIFORM, "reasoning", "thinking", "sharegpt", "chats", "bursts", "drift")
ARTIFACT_COLUMNS = ("workload", "policy", "steps", "memory", "evicted", "published")
SERVE_COLUMNS = (
    "workload", "policy", "goodput", "goodput_sd", "tokens_per_second", "memory", "evicted", "broken", "ttft_p99",
    "gap_p99", "cached", "lost",
)  # fmt: skip
RATIOS = (
    "workload", "policy", "by_conservative", "by_conservative_least", "by_aggressive", "by_aggressive_least",
    "by_optimum",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (%(default)s)")
    parser.add_argument("--save", metavar="NAME", help="keep the result as tools/results/NAME.json and .png")
    commands = parser.add_subparsers(dest="command", required=True)
    counted = commands.add_parser("artifact", help="the paper's workloads as its artifact counts them")
    counted.add_argument("--requests", type=int, default=3000, help="of each workload (%(default)s)")
    counted.add_argument("--workloads", nargs="+", default=list(workloads.UNIFORM), choices=workloads.UNIFORM)
    counted.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    served = commands.add_parser("serve", help="in the time of a real device")
    served.add_argument("--workloads", nargs="+", default=[*workloads.UNIFORM, "reasoning"], choices=EVERYTHING)
    served.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    helps = {
        "costs": "a file, or the name of one in tools/results/costs", "clients": "that ask one thing at a time each",
        "pool": "KV slots", "rows": "requests that run at once", "chunk": "prompt tokens of one iteration",
        "cap": "max_tokens of every request", "warm_up": "seconds before the window", "window": "seconds that count",
        "order": "of the queue: fcfs, fair, deadline or sla", "pause_order": "fcfs, sjf or hrrn",
        "gap_target": "seconds that an iteration may take; 0 keeps the chunks whole",
        "lengths": "JSON file of [prompt, output] lengths, for sharegpt",
        "scale": "what all lengths are divided by",
    }  # fmt: skip
    for name, text in helps.items():
        default = SETUP[name]
        kind = str if default is None else type(default)
        served.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (%(default)s)")
    served.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of the workload; figures are means (%(default)s)"
    )
    served.add_argument("--impatient", action="store_true", help="clients go away when their stream stands still")
    fitted = commands.add_parser("fit", help="the cost model to what --record kept, or to a result of bench static")
    fitted.add_argument("file", type=Path)
    fitted.add_argument("--as", dest="name", help="name of the file in tools/results/costs; that of FILE without it")
    fitted.add_argument(
        "--what", default=f"fitted on {time.strftime('%Y-%m-%d')}", help="model, GPU, date (%(default)s)"
    )
    args = parser.parse_args()
    if args.command == "fit":
        path = costing.FOLDER / f"{args.name or args.file.stem}.json"
        costing.save(costing.fit(costing.iterations(args.file), args.what), path)
        print(f"{path}:\n{path.read_text()}", end="")
        return
    pairs = [(load, policy) for load in args.workloads for policy in args.policies]
    if args.command == "artifact":
        setup: dict[str, Any] = {"accounting": "artifact", "pool": POOL, "requests": args.requests}
        jobs: list[list[tuple[Any, ...]]] = [[(artifact, *pair, args.requests)] for pair in pairs]
        columns, panels = ARTIFACT_COLUMNS, ("steps", "memory", "evicted")
    else:
        if "sharegpt" in args.workloads and not args.lengths:
            parser.error("sharegpt needs --lengths FILE")
        setup = {
            "accounting": "honest",
            **{name: getattr(args, name) for name in SETUP if name not in ("seed", "lengths")},
        }
        whole = setup | {"lengths": args.lengths}
        jobs = [[(serve, *pair, whole | {"seed": seed}) for seed in args.seeds] for pair in pairs]
        columns, panels = SERVE_COLUMNS, ("goodput", "broken", "memory", "gap_p99")
        setup["seeds"] = args.seeds
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for futures in [[pool.submit(*run) for run in runs] for runs in jobs]:
            runs = [future.result() for future in futures]
            rows.append(runs[0] if args.command == "artifact" else report.over_seeds(runs))
            print(report.table(rows[-1:], columns).split("\n")[1], flush=True)
            if args.save:
                report.save(args.save, rows, setup, panels, (*EVERYTHING, *POLICIES))
    print("\n" + report.table(rows, columns))
    if args.command == "serve":
        report.beside(rows)
        print("\n" + report.table(rows, RATIOS))


if __name__ == "__main__":
    main()
