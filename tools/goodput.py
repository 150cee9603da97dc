"""Goodput of a real server under each admission policy, beside what the simulator predicts.

    python tools/goodput.py --model qwen3-8b/ --pool 120000                       Qwen3-8B's shape on a GPU
    python tools/goodput.py --scale 32 --pool 3750 --model ""                     the demo model on this CPU

Starts a server for each policy and lets closed loops of clients ask for completions: random prompts as token ids,
streamed, each with a length of output that only the client knows (a stop token that every draw would be, forbidden
before that length by min_tokens, which the scheduler does not look at). A server gives up on whoever waited for eight
seconds, and the client then asks something else. Good are the answers whose first token came within 10 s and whose
longest gap was at most 1.5 s; goodput is the output tokens of good answers that ended in the window, by its seconds.

The first server's messages are recorded, the simulator's cost model is fitted to them, and the same requests are
simulated under each policy. Weights may be random: `--load_format dummy` is the default for a folder.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import costs as costing
import report
import simulate
import workloads
from serving import Server
from simulator import Agreement, Ask

POLICIES = ("past-future", "conservative", "aggressive")
STOP = 7  # a token id of every vocabulary
COLUMNS = (
    "policy",
    "from",
    "goodput",
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
    return Answer(asked, first, last, gap, tokens, done)


async def clients(url: str, settings: dict[str, Any]) -> list[Answer]:
    """Closed loops until the window is over."""
    parts = urlsplit(url)
    asks = workloads.scaled(
        workloads.uniform(settings["workload"], settings["seed"], settings["cap"]), settings["scale"]
    )
    began, answers = time.monotonic(), []

    async def loop() -> None:
        while True:
            answers.append(
                await ask_one(str(parts.hostname), parts.port or 80, next(asks), settings["vocabulary"], began)
            )

    tasks = [asyncio.create_task(loop()) for _ in range(settings["clients"])]
    await asyncio.wait(tasks, timeout=settings["warm_up"] + settings["window"])
    for task in tasks:
        if task.done():
            task.result()  # a client that failed
        task.cancel()
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


def real(policy: str, settings: dict[str, Any], record: str | None) -> dict[str, Any]:
    """Serve and measure one policy."""
    flags = [
        "--schedule_policy", policy, "--max_total_token_num", str(settings["pool"]), "--running_max_req_size",
        str(settings["rows"]), "--chunked_prefill_size", str(settings["chunk"]), "--max_queue", "100000",
        "--max_queue_tokens", str(10**9), "--queue_timeout", str(Agreement().patience), "--log_level", "error",
    ]  # fmt: skip
    if settings["model"]:
        flags += ["--model_dir", settings["model"], "--load_format", settings["load_format"]]
    flags += [*(["--record", record] if record else []), *settings["flags"]]
    with Server(*flags) as server:
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


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        url, settings = sys.argv[2], json.loads(sys.argv[3])
        json.dump(asyncio.run(clients(url, settings)), sys.stdout)
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="", help="folder or name; empty is the demo model")
    parser.add_argument("--load_format", default="dummy", help="auto or dummy (%(default)s)")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--workload", default="decode-heavy", choices=workloads.UNIFORM, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=40_000, help="ids of prompts lie below (%(default)s)")
    parser.add_argument("--clients", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--pool", type=int, default=simulate.POOL, help="KV slots (%(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="requests that run at once (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens of one iteration (%(default)s)")
    parser.add_argument("--cap", type=int, default=workloads.CAP, help="max_tokens before scaling (%(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="what all lengths are divided by (%(default)s)")
    parser.add_argument("--warm_up", type=float, default=60, help="seconds (%(default)s)")
    parser.add_argument("--window", type=float, default=90, help="seconds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--costs", help="use this cost model instead of a fit to the first server's iterations")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    parser.add_argument("flags", nargs="*", help="more flags of the server, behind --")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name not in ("save", "costs", "policies")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        for policy in args.policies:
            keep = None if args.costs or rows else str(record)
            rows.append(real(policy, settings, keep))
            print(report.table(rows[-1:], COLUMNS), flush=True)
        if args.costs:
            costs = costing.load(args.costs)
        else:
            costs = costing.fit(record, f"{args.model or 'demo model'}, fitted by tools/goodput.py")
        fitted = Path(folder) / "costs.json"
        costing.save(costs, fitted)
        print(fitted.read_text())
        setup = {**simulate.SETUP, **{name: settings[name] for name in settings if name in simulate.SETUP}}
        for policy in args.policies:
            row = simulate.serve(args.workload, policy, setup | {"costs": str(fitted)})
            rows.append(row | {"from": "simulated"})
    rows.sort(key=lambda row: args.policies.index(row["policy"]))
    print("\n" + report.table(rows, COLUMNS))
    for policy in args.policies:
        measured, predicted = (row["goodput"] for row in rows if row["policy"] == policy)
        apart = predicted / max(1e-9, measured) - 1
        print(f"{policy}: real {measured:,.0f} tokens/s, simulated {predicted:,.0f}: {apart:+.1%}")
    if args.save:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        document = {"about": about | settings, "costs": json.loads(costing.as_json(costs)), "runs": rows}
        args.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
