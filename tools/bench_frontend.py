"""What the front end costs: CPU time of the server process for each token that it streams.

    python tools/bench_frontend.py [--save tools/results/bench_frontend.json]

The server is real (uvloop, the HTTP application, engine, detokenizer of the demo model) in a process of its own; a
stand-in in that process plays the worker: it keeps the loop's contract and publishes one iteration every 20 ms (every
50 ms for 1,024 streams: 20,480 tokens/s), or several at once when the event loop is behind, as a pipe would bring them.
Chats ask for text alone; the rows of real life are completions with the fields of `bench serve --real-life`.
Its own CPU time is measured afterwards, by playing the same updates to it with nobody listening, and subtracted. The
client is another process with raw sockets. Requests are counted in (reading, template, tokenizing, admission), and so
is the decoding of results; the system call that reads the worker's pipe is not.

CPU time is what counts, so others may use the machine, though a neighbour on the same core makes it longer; `kernel` is
the part of it in system calls, most of it in the one write for each stream and iteration. `cpu share` is of one core
while tokens flow. `tokens/event` grows where the event loop is behind, which makes tokens cheap and events dear: runs
are compared by events. `lag` is how late the loop was.
"""

import argparse
import asyncio
import json
import os
import platform
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from stand_in import Said, StandIn, front

from aiollm.api.app import serve
from aiollm.bench.serve import REAL_LIFE
from aiollm.garbage import settle
from aiollm.wire.messages import Update

STEPS = {1: 0.020, 16: 0.020, 256: 0.020, 1024: 0.050}  # connections -> seconds of an iteration
TOKENS = 400  # of each stream
SLOTS = 4_000_000
QUESTION = "Read the licence to me."
LOADS = [(1, False), (16, False), (256, False), (1024, False), (256, True), (1024, True)]  # connections, real life
LIMITS = {(256, False): 25.0, (1024, False): 30.0, (256, True): 40.0, (1024, True): 60.0}  # microseconds an event
OTHER_EVENTS = {False: 4, True: 2}  # of a stream, beside those with text: usage, [DONE]; a chat's role, finish reason
ROW = (
    "{connections:>11}{load:>11}{us_per_token:>10}{us_per_event:>10}{kernel_us_per_token:>9}{plan_us_per_token:>7}"
    "{tokens_per_event:>14}{tokens_per_second:>10}{cpu_share:>11.0%}{lag_p50_ms:>9}{lag_p99_ms:>9}"
)


def own_seconds(rows: int, step: float, said: Said, log: list[list[Update]]) -> float:
    """CPU seconds of the stand-in alone: the same updates before the same iterations, results dropped."""
    iterations = 0

    def count(body: bytes) -> None:
        nonlocal iterations
        iterations += 1

    alone = StandIn(rows, step, said, count)
    began = time.process_time()
    for updates in log[:-1]:
        for update in updates:
            alone.take(update)
        alone.step()
    seconds = time.process_time() - began
    assert iterations == len(log) - 1, "it did not do the same"
    return seconds


class Lag:
    """How late the loop runs what is due, looked at every 10 ms."""

    EVERY = 0.010

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.found: list[float] = []
        self._handle = self._loop.call_later(self.EVERY, self._look)

    def _look(self) -> None:
        self.found.append(max(0.0, self._loop.time() - self._handle.when()))
        self._handle = self._loop.call_later(self.EVERY, self._look)

    def stop(self) -> None:
        self._handle.cancel()


def timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`work`, whose CPU seconds are noted."""

    def run(*args: Any) -> Any:
        began = time.process_time()
        found = work(*args)
        seconds.append(time.process_time() - began)
        return found

    return run


async def measure(connections: int, real_life: bool) -> dict[str, Any]:
    """Serve one client process with so many streams, and tell what that cost."""
    step, rows = STEPS[connections], max(STEPS)
    made = front(rows, rows, SLOTS)
    engine, log = made.engine, list[list[Update]]()
    made.worker(rows, step, log)
    assert engine.core is not None
    planning: list[float] = []
    engine.core.plan = timed(engine.core.plan, planning)  # type: ignore[method-assign]
    settle()  # as the server does
    runner = await serve(made.app, "127.0.0.1", 0)
    command = [sys.executable, __file__, "--client", str(connections), "--port", str(runner.addresses[0][1])]
    command += ["--real-life"] * real_life
    client = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None and client.stdout is not None
    await client.stdout.readline()  # it is connected
    lag = Lag()
    cpu, kernel, began = time.process_time(), os.times().system, time.perf_counter()
    client.stdin.write(b"\n")
    found = json.loads(await client.stdout.readline())
    cpu, kernel, wall = time.process_time() - cpu, os.times().system - kernel, time.perf_counter() - began
    lag.stop()
    await client.wait()
    await runner.cleanup()
    tokens = connections * TOKENS
    assert found["tokens"] == tokens, found
    own = own_seconds(rows, step, made.said, log)
    events = found["events"] - OTHER_EVENTS[real_life] * connections
    return {
        "connections": connections,
        "real_life": real_life,
        "us_per_token": round((cpu - own) / tokens * 1e6, 2),
        "us_per_event": round((cpu - own) / events * 1e6, 2),
        "kernel_us_per_token": round(kernel / tokens * 1e6, 2),
        "plan_us_per_token": round(sum(planning) / tokens * 1e6, 2),
        "tokens_per_event": round(tokens / events, 2),
        "tokens_per_second": round(tokens / wall),
        "worker_us_per_token": round(own / tokens * 1e6, 2),
        "cpu_seconds": round(cpu, 3),
        "cpu_share": round((cpu - own) / wall, 3),
        "lag_p50_ms": round(1e3 * float(np.percentile(lag.found, 50)), 2),
        "lag_p99_ms": round(1e3 * float(np.percentile(lag.found, 99)), 2),
    }


def request(real_life: bool, seed: int) -> bytes:
    """One request as HTTP."""
    if real_life:
        path, asked = "/v1/completions", {"prompt": QUESTION, **REAL_LIFE, "seed": seed}
    else:
        path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], "ignore_eos": True}
    common = {"max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked | common).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def client(connections: int, port: int, real_life: bool) -> dict[str, int]:
    """All streams at once; counts events, and the tokens that the usage of each stream tells."""
    selector = selectors.DefaultSelector()
    tails = {socket.create_connection(("127.0.0.1", port)): b"" for _ in range(connections)}
    print("connected", flush=True)
    sys.stdin.readline()
    for seed, stream in enumerate(tails):
        selector.register(stream, selectors.EVENT_READ)
        stream.sendall(request(real_life, seed))
    events = tokens = 0
    while tails:
        for key, _ in selector.select():
            source = key.fileobj
            assert isinstance(source, socket.socket)
            data = source.recv(1 << 16)
            if data:
                *whole, tails[source] = (tails[source] + data).split(b"\n\n")
                events += len(whole)
                for event in whole[-2:]:
                    if b'"completion_tokens":' in event:
                        tokens += int(event.partition(b'"completion_tokens":')[2].partition(b",")[0])
            else:
                selector.unregister(source)
                source.close()
                del tails[source]
    return {"events": events, "tokens": tokens}


def machine() -> dict[str, Any]:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("aiohttp", "uvloop", "msgspec", "numpy", "tokenizers")},
        "date": datetime.now(UTC).date().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU time of the server for each token that it streams")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each row; the one that cost least is told (3)")
    parser.add_argument("--server", type=int, metavar="CONNECTIONS", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, metavar="CONNECTIONS", help=argparse.SUPPRESS)
    parser.add_argument("--real-life", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(json.dumps(client(args.client, args.port, args.real_life)))
        return 0
    if args.server:
        print(json.dumps(uvloop.run(measure(args.server, args.real_life))))
        return 0
    found: dict[str, Any] = {"machine": machine(), "tokens": TOKENS, "step_seconds": STEPS, "rows": []}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print(
        f"{'connections':>11}{'':>11}{'us/token':>10}{'us/event':>10}{'kernel':>9}{'plan':>7}"
        f"{'tokens/event':>14}{'tokens/s':>10}{'cpu share':>11}{'lag p50':>9}{'lag p99':>9}"
    )
    for connections, real_life in LOADS:
        command = [sys.executable, __file__, "--server", str(connections)] + ["--real-life"] * real_life
        runs = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(args.repeat)
        ]
        row = min(runs, key=lambda run: float(run["us_per_event"]))
        row["us_per_event_of_runs"] = [run["us_per_event"] for run in runs]
        print(ROW.format(**row, load="real life" * real_life), flush=True)
        found["rows"].append(row)
    costs = {(row["connections"], row["real_life"]): row["us_per_event"] for row in found["rows"]}
    for load, limit in LIMITS.items():
        print(f"at {load[0]} connections{', real life' * load[1]}: {costs[load]} us an event; the limit is {limit:g}")
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(costs[load] <= limit for load, limit in LIMITS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
