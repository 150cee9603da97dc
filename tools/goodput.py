"""Goodput of a real server under each admission policy, beside what the simulator predicts.

    python tools/goodput.py --shape qwen3-8b --save FILE          random weights of Qwen3-8B's shape, on a GPU
    python tools/goodput.py --scale 32 --pool 3750 --save FILE    the demo model on this CPU
    python tools/goodput.py --predict FILE                        simulate again what FILE has

Starts a server for each policy and lets closed loops of clients ask for completions: random prompts as token ids,
streamed, each with a length of output that only the client knows (a stop token that every draw would be, forbidden
before that length by min_tokens, which the scheduler does not look at). A server gives up on whoever waited for eight
seconds, and the client then asks something else. Good are the answers whose first token came within 10 s and whose
longest gap was at most 1.5 s; goodput is the output tokens of good answers that ended in the window, by its seconds.

The servers' messages are recorded, the simulator's cost model is fitted to the durations of iterations in them, and the
same requests are simulated under each policy, on a machine that is as much slower or faster than the model, ten seconds
by ten seconds, as the real one was. A simulation whose iterations scatter a little otherwise may end far off, so that
there are several, with their mean and standard deviation. FILE is written after each server.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import costs as costing
import report
import simulate
import workloads
from bench_gpu import machine
from serving import Server
from shapes import SHAPES, write
from simulator import Agreement, Ask, Uneven

POLICIES = ("past-future", "conservative", "aggressive")
STOP = 7  # a token id of every vocabulary
TRIALS = 10  # simulated runs of each policy, which differ in the device's scatter
PROGRESS = 10  # seconds between two lines that say how far a run is
COLUMNS = (
    "policy",
    "from",
    "goodput",
    "goodput_sd",
    "tokens_per_second",
    "evicted",
    "ttft_p50",
    "ttft_p99",
    "gap_p50",
    "gap_p99",
    "lost",
)


class Answer(NamedTuple):
    """What one client saw. Times are seconds since the run began; `first` is negative where none came."""

    asked: float
    first: float
    last: float
    gap: float
    tokens: int
    done: bool


async def ask_one(host: str, port: int, ask: Ask, vocabulary: int, began: float) -> Answer:
    """One streamed completion over a connection of its own."""
    body = json.dumps(
        {
            "prompt": [10 + int(token) % (vocabulary - 10) for token in ask.prompt], "max_tokens": ask.max_tokens,
            "min_tokens": max(0, ask.output - 1), "temperature": 0, "ignore_eos": True, "stop_token_ids": [STOP],
            "logit_bias": {str(STOP): 100}, "stream": True, "return_token_ids": True,
        }
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    asked = time.monotonic() - began
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    first = last = -1.0
    gap, tokens, done = 0.0, 0, False
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if b" 200 " not in (status := await reader.readline()):
            raise RuntimeError(f"{status.decode()}{(await reader.read()).decode()}")
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                break
            now = time.monotonic() - began
            for choice in event["choices"]:
                drawn = len(choice.get("token_ids") or ())
                done |= choice["finish_reason"] is not None
                if drawn:
                    gap = max(gap, now - last) if tokens else gap
                    first, last = first if tokens else now, now
                    tokens += drawn
    except ConnectionError:
        pass  # the window is over
    finally:
        writer.close()
    if done and tokens != ask.output:
        raise RuntimeError(f"an answer has {tokens} tokens, not {ask.output}")
    return Answer(asked, first, last, gap, tokens, done)


async def clients(url: str, settings: dict[str, Any]) -> list[Answer]:
    """Closed loops until the window is over; one that fails ends all."""
    parts, asks = urlsplit(url), simulate.asks_of(settings["workload"], settings)
    began = time.monotonic()
    answers: list[Answer] = []

    async def loop() -> None:
        while True:
            answers.append(
                await ask_one(str(parts.hostname), parts.port or 80, next(asks), settings["vocabulary"], began)
            )

    async def tell() -> None:
        while True:
            await asyncio.sleep(PROGRESS)
            done = sum(answer.done for answer in answers)
            print(f"{time.monotonic() - began:4.0f} s: {done} answers, {len(answers) - done} lost", file=sys.stderr)

    with suppress(TimeoutError):
        async with asyncio.timeout(settings["warm_up"] + settings["window"]), asyncio.TaskGroup() as group:
            for task in [tell(), *(loop() for _ in range(settings["clients"]))]:
                group.create_task(task)
    return answers


def figures(answers: list[Answer], settings: dict[str, Any]) -> dict[str, Any]:
    """The same figures as simulate.serve gives."""
    agreement, begin = Agreement(), settings["warm_up"]
    end = begin + settings["window"]
    inside = [answer for answer in answers if answer.first >= 0 and begin <= answer.last <= end]
    good = [
        answer for answer in inside
        if answer.done and answer.first - answer.asked <= agreement.ttft and answer.gap <= agreement.gap
    ]  # fmt: skip
    first = [answer.first - answer.asked for answer in answers if answer.first >= begin]
    gaps = [answer.gap for answer in inside]
    return {
        "goodput": sum(answer.tokens for answer in good) / settings["window"],
        "tokens_per_second": sum(answer.tokens for answer in inside) / settings["window"],
        "answers": len(inside), "good": len(good), "lost": sum(answer.first < 0 for answer in answers),
        "ttft_p50": report.percentile(first, 50), "ttft_p99": report.percentile(first, 99),
        "gap_p50": report.percentile(gaps, 50), "gap_p99": report.percentile(gaps, 99),
    }  # fmt: skip


def real(policy: str, settings: dict[str, Any], model: list[str], record: Path, patience: float) -> dict[str, Any]:
    """Serve and measure one policy. `model` are the flags that name it; the server has to start within `patience`."""
    flags = [
        "--schedule_policy", policy, "--max_total_token_num", str(settings["pool"]), "--running_max_req_size",
        str(settings["rows"]), "--chunked_prefill_size", str(settings["chunk"]), "--max_queue", "100000",
        "--max_queue_tokens", str(10**9), "--queue_timeout", str(Agreement().patience), "--log_level", "error",
        "--record", str(record), *model, *settings["flags"],
    ]  # fmt: skip
    with Server(*flags, patience=patience) as server:
        command = [sys.executable, __file__, "--client", server.url, json.dumps(settings)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        answers = [Answer(*values) for values in json.loads(done.stdout)]
        pauses = server.metric("aiollm_num_preemptions_total")
        steps = server.metric("aiollm_iteration_seconds_count")
        thought = server.metric("aiollm_scheduler_seconds_sum")
    ended = max(1, sum(answer.done for answer in answers))
    return {
        "policy": policy, "from": "real", **figures(answers, settings), "evicted": 100 * pauses / ended,
        "iterations": int(steps), "scheduler_us": round(1e6 * thought / max(1, steps), 1),
    }  # fmt: skip


def keep(document: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")


def measure(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """A server for each policy, and the cost model that fits their iterations; saved after each of them."""
    deadline = time.monotonic() + args.seconds
    what = f"{args.shape or args.model or 'demo model'}, fitted by tools/goodput.py"
    document: dict[str, Any] = {"about": machine() | settings, "costs": None, "runs": []}
    iterations: dict[str, list[costing.Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model_dir", args.model] if args.model else []
        if args.shape:
            model = ["--model_dir", str(write(Path(folder, args.shape), SHAPES[args.shape])), "--load_format", "dummy"]
        records = args.records or Path(folder)
        records.mkdir(parents=True, exist_ok=True)
        for policy in args.policies:
            patience = deadline - time.monotonic() - settings["warm_up"] - settings["window"]
            if patience < 0:
                print(f"{policy}: no time left (--seconds)")
                break
            document["runs"].append(real(policy, settings, model, records / policy, patience))
            print(report.table(document["runs"], COLUMNS), flush=True)
            keep(document, args.save)
            iterations[policy] = list(costing.iterations(records / policy))
            costs = costing.fit(chain(*iterations.values()), what)
            document["costs"] = json.loads(costing.as_json(costs))
            for row in document["runs"]:
                row.update(costing.unevenness(costs, iterations[row["policy"]])._asdict())
            keep(document, args.save)
    return document


def predict(document: dict[str, Any]) -> None:
    """Simulate what was measured, TRIALS times each, and show both."""
    about, measured = document["about"], [row for row in document["runs"] if row["from"] == "real"]
    setup = simulate.SETUP | {name: value for name, value in about.items() if name in simulate.SETUP}
    document["runs"] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        costs = Path(folder, "costs.json")
        costs.write_text(json.dumps(document["costs"]))
        jobs = [
            [
                pool.submit(
                    simulate.serve, about["workload"], row["policy"], setup | {"costs": str(costs)},
                    Uneven(row["drift"], row["scatter"]), seed,
                )
                for seed in range(TRIALS)
            ]
            for row in measured
        ]  # fmt: skip
        for row, trials in zip(measured, jobs, strict=True):
            simulated = report.over_seeds([trial.result() for trial in trials])
            document["runs"] += [row, simulated | {"from": "simulated"}]
            apart = [simulated[name] / max(1e-9, row[name]) - 1 for name in ("goodput", "tokens_per_second")]
            print("{}: simulated goodput is {:+.1%} off, tokens/s {:+.1%}".format(row["policy"], *apart))
    print(report.table(document["runs"], COLUMNS))


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        url, settings = sys.argv[2], json.loads(sys.argv[3])
        json.dump(asyncio.run(clients(url, settings)), sys.stdout)
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", help="folder or name; the demo model without it")
    models.add_argument("--shape", choices=[*SHAPES], help="a shape with random weights instead")
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=[*POLICIES, "lightllm"])
    parser.add_argument(
        "--workload", default="decode-heavy", choices=[*workloads.UNIFORM, "reasoning"], help="(%(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=40_000, help="ids of prompts lie below (%(default)s)")
    parser.add_argument("--clients", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--pool", type=int, default=simulate.POOL, help="KV slots (%(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="requests that run at once (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens of one iteration (%(default)s)")
    parser.add_argument("--cap", type=int, default=workloads.CAP, help="max_tokens before scaling (%(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="what all lengths are divided by (%(default)s)")
    parser.add_argument("--warm_up", type=float, default=60, help="seconds (%(default)s)")
    parser.add_argument("--window", type=float, default=90, help="seconds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="no server starts that would not be done by then")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="keep the messages of each server there")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="measure nothing, simulate what --save wrote")
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    args = parser.parse_args()
    if args.predict:
        document, path = json.loads(args.predict.read_text()), args.predict
    else:
        apart = ("save", "policies", "seconds", "records", "predict")
        document = measure(args, {name: value for name, value in vars(args).items() if name not in apart})
        path = args.save
    predict(document)
    keep(document, path)


if __name__ == "__main__":
    main()
