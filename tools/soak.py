"""Half an hour's abuse in minutes: everything that a server holds has to be as flat at the end as at the beginning.

    python tools/soak.py [--save tools/results/soak.json]

First the real front end over a stand-in for the worker, with 1,000 chats over WebSockets and 1,000 event streams at
once; then the demo model with its real worker and 100 of each. Beside them others leave in the midst, read nothing,
send what is broken, too long or too much, and flood the queue, while the worker is killed again and again. Clients are
another process, and so are the probes.

The figures are taken from outside, every two seconds: /proc, /metrics, and /health twenty times a second. What the
server holds when all have left is compared with what it held at rest before they came. They came once before that: an
allocator keeps what the most at once needed, so only a second round like the first shows what grows. /health and the
loop's lag are compared with 50 ms; both need a core that is free when they do.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_frontend import machine
from serving import Server

EVERY = 2.0  # seconds between two looks
PROBE = 0.05  # between two looks at /health
LATE = 0.050  # seconds that /health may take, all but one in a hundred times
CROWDED = 0.1  # share of the time without a core from which on that says nothing of the server
GROWTH = 50  # MB
SHOWN = 5  # looks to a line of the table
PATIENCE = 120  # seconds for an answer on a machine that others use
# Of a template whose client has left: Python tells where the interrupt hit a destructor, which swallows it; another one
# follows.
INTERRUPT = "aiollm.text.limit._Overdue"
GONE = 30  # seconds in which everything has to be given back
COLUMNS = (
    "seconds", "server_mb", "workers_mb", "descriptors", "threads", "tasks", "running", "waiting", "cached",
    "slots_used", "tokens_per_s", "no_core", "lag_p99_ms", "health_p50_ms", "health_p99_ms", "health_max_ms",
)  # fmt: skip


class Setup(NamedTuple):
    """Who is served by what, and how long; times are seconds."""

    name: str
    server: Callable[[], Server]
    kill: Callable[[Server], object]
    """The worker."""
    sockets: int
    streams: int
    abusers: int
    tokens: int
    """Of each answer."""
    load: float
    """Of each of the two rounds."""
    kill_every: float


class Probe:
    """Asks for /health over one connection, again and again, in a thread."""

    def __init__(self, server: Server) -> None:
        self._address = server.url.removeprefix("http://")
        self._over = threading.Event()
        self.took: list[float] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.closing(http.client.HTTPConnection(self._address, timeout=PATIENCE)) as client:
            while not self._over.wait(PROBE):
                began = time.monotonic()
                client.request("GET", "/health")
                answer = client.getresponse()
                answer.read()
                assert answer.status == 200
                self.took.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class Watch:
    """Looks at a server, and remembers what it saw."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen: list[dict[str, float]] = []
        self.probe = Probe(server)
        self._began = self._looked = time.monotonic()
        self._tokens, self._lag, self._asked, self._delayed = 0.0, dict[float, float](), 0, self.delayed()

    def delayed(self) -> float:
        """Seconds for which the server's event loop waited for a core so far."""
        return int(Path(f"/proc/{self.server.process.pid}/schedstat").read_text().split()[1]) / 1e9

    def look(self) -> dict[str, float]:
        """What the server holds and does now; rates and times are of the time since the last look."""
        server, now = self.server, time.monotonic()
        descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))  # before another connection takes one
        delayed, passed = self.delayed(), max(now - self._looked, 1e-3)
        lines = server.get("/metrics", PATIENCE)[1].splitlines()
        samples = dict(line.rsplit(" ", 1) for line in lines if line[:1] != "#")
        figure = {name: float(value) for name, value in samples.items()}
        tokens, lag, asked = figure["aiollm_generation_tokens_total"], buckets(figure), len(self.probe.took)
        late = {bound: count - self._lag.get(bound, 0) for bound, count in lag.items()}
        took = sorted(self.probe.took[self._asked : asked]) or [0.0]
        found = {
            "seconds": round(now - self._began, 1),
            "server_mb": server.memory() >> 20,
            "workers_mb": server.workers_memory() >> 20,
            "descriptors": descriptors,
            "threads": len(os.listdir(f"/proc/{server.process.pid}/task")),
            "tasks": figure["aiollm_event_loop_tasks"],
            "running": figure["aiollm_num_requests_running"],
            "waiting": figure["aiollm_num_requests_waiting"],
            "cached": round(figure["aiollm_prefix_cache_usage_perc"], 2),
            "slots_used": round(figure["aiollm_kv_cache_usage_perc"], 4),
            "tokens_per_s": round((tokens - self._tokens) / passed),
            "no_core": round((delayed - self._delayed) / passed, 3),
            "lag_p99_ms": 1e3 * quantile(late, 0.99),
            "health_p50_ms": round(1e3 * statistics.median(took), 1),
            "health_p99_ms": round(1e3 * took[int(0.99 * (len(took) - 1))], 1),
            "health_max_ms": round(1e3 * took[-1], 1),
        }
        self._looked, self._tokens, self._lag, self._asked, self._delayed = now, tokens, lag, asked, delayed
        self.seen.append(found)
        return found

    def at_rest(self) -> dict[str, float]:
        """What is held once nothing runs and no more is given back; what still is after GONE seconds is told."""
        deadline, found = time.monotonic() + GONE, self.look()
        while time.monotonic() < deadline:
            time.sleep(0.5)
            before, found = found, self.look()
            same = all(before[name] == found[name] for name in ("descriptors", "tasks", "running", "waiting"))
            if same and not found["running"] + found["waiting"]:
                return found
        return found


def buckets(figure: dict[str, float]) -> dict[float, float]:
    """How often the loop was at most so late, by seconds."""
    head, tail = 'aiollm_event_loop_lag_seconds_bucket{le="', '"}'
    return {float(name[len(head) : -len(tail)]): count for name, count in figure.items() if name.startswith(head)}


def quantile(counts: dict[float, float], share: float) -> float:
    """The bound within which so large a share of what was counted lies; the largest one where none is large enough."""
    total, bounds = max(counts.values(), default=0), [bound for bound in counts if bound < math.inf]
    return min((bound for bound in bounds if counts[bound] >= share * total), default=max(bounds, default=0.0))


def row(values: dict[str, float]) -> str:
    return "".join(f"{values[name]:>{len(name) + 2}g}" for name in COLUMNS)


@contextlib.contextmanager
def clients(server: Server, setup: Setup, tally: dict[str, int]) -> Iterator[None]:
    """A crowd; when the block ends it may end what it began, and what came of all is added to the tally."""
    counts = {"port": int(server.url.rsplit(":", 1)[1])} | {
        name: getattr(setup, name) for name in ("sockets", "streams", "abusers", "tokens")
    }
    flags = [text for name, count in counts.items() for text in (f"--{name}", str(count))]
    program = Path(__file__).parent / "soak_clients.py"
    with subprocess.Popen([sys.executable, str(program), *flags], stdout=subprocess.PIPE) as process:
        try:
            yield
            process.terminate()
            assert process.stdout is not None
            for outcome, count in json.load(process.stdout).items():
                tally[outcome] = tally.get(outcome, 0) + count
        finally:
            process.kill()


def abuse(watch: Watch, setup: Setup, tally: dict[str, int]) -> int:
    """One round, watched; what came of its requests is added to the tally. Says how often it killed the worker."""
    server, began, kills, looks = watch.server, time.monotonic(), 0, 0
    with clients(server, setup, tally):
        while (now := time.monotonic() - began) < setup.load:
            time.sleep(EVERY)
            found, looks = watch.look(), looks + 1
            if looks % SHOWN == 0:
                print(row(found), flush=True)
            if now > (kills + 1) * setup.kill_every and server.get("/ready", PATIENCE)[0] == 200:
                kills += 1
                setup.kill(server)
    return kills


def soak(setup: Setup) -> dict[str, Any]:
    """Run it: its figures over time, outcomes by kind, and under "failures" all that was not flat."""
    tally: dict[str, int] = {}
    with setup.server() as server:
        watch = Watch(server)
        try:
            abuse(watch, setup, {})
            before = watch.at_rest()
            loaded, asked = len(watch.seen), len(watch.probe.took)
            kills = abuse(watch, setup, tally)
            under_load = watch.seen[loaded:]
            after = watch.at_rest()
        finally:
            watch.probe.stop()
        log = server.log()
    took = sorted(watch.probe.took[asked:])
    health = {
        "asked": len(took),
        "p50_ms": round(1e3 * took[len(took) // 2], 1),
        "p99_ms": round(1e3 * took[int(0.99 * len(took))], 1),
        "max_ms": round(1e3 * took[-1], 1),
        "no_core": round(statistics.mean(look["no_core"] for look in under_load), 3),
    }
    print(row(after), flush=True)
    failures = uneven(before, after, under_load) + unexpected(tally, kills)
    if health["p99_ms"] > 1e3 * LATE and health["no_core"] < CROWDED:
        failures.append(f"/health took {health['p99_ms']} ms, one time in a hundred")
    tracebacks = log.split("Traceback (most recent call last):")[1:]
    failures += [f"in the log: {part[:500]}" for part in tracebacks if INTERRUPT not in part]
    return {
        **{name: getattr(setup, name) for name in ("name", "sockets", "streams", "abusers", "tokens", "load")},
        "kills": kills, "before": before, "after": after, "health": health,
        "outcomes": dict(sorted(tally.items())), "failures": failures, "over_time": under_load,
    }  # fmt: skip


def uneven(before: dict[str, float], after: dict[str, float], loaded: list[dict[str, float]]) -> list[str]:
    """What was not given back, or grew all the time."""
    limits = {"server_mb": GROWTH, "workers_mb": GROWTH, "descriptors": 0, "threads": 1, "tasks": 0}
    found = [
        f"{name}: {before[name]:g} before, {after[name]:g} afterwards"
        for name, more in limits.items()
        if after[name] > before[name] + more
    ]
    found += [f"{name}: {after[name]:g} afterwards" for name in ("running", "waiting", "slots_used") if after[name]]
    third = len(loaded) // 3
    for name in ("server_mb", "workers_mb"):
        middle, end = (
            statistics.median(look[name] for look in part) for part in (loaded[third : 2 * third], loaded[2 * third :])
        )
        if end > 1.1 * middle + GROWTH / 2:
            found.append(f"{name} under load: {middle:g} in the middle, {end:g} at the end")
    return found


def unexpected(tally: dict[str, int], kills: int) -> list[str]:
    """Outcomes that nobody expected, and those that are missing."""
    found = [f"{count} times {outcome}" for outcome, count in tally.items() if outcome.startswith("unexpected")]
    found += [f"no {kind} came whole" for kind in ("stream", "conversation") if not tally.get(f"{kind}: whole")]
    return found + ["no worker was killed"] * (not kills)


def stand_in(sockets: int = 1000, streams: int = 1000, load: float = 60, step: float = 0.5, abusers: int = 20) -> Setup:
    """`step` is the seconds of an iteration."""
    program = (str(Path(__file__).parent / "stand_in.py"), "--rows", str(sockets + streams + 500), "--step", str(step))
    return Setup(
        "stand-in", lambda: Server(program=program), lambda server: server.process.send_signal(signal.SIGUSR1),
        sockets, streams, abusers, 40, load, load / 3,
    )  # fmt: skip


def demo(sockets: int = 100, streams: int = 100, load: float = 60) -> Setup:
    flags = ("--running_max_req_size", "64", "--max_total_token_num", "20000", "--max_restarts", "100")
    return Setup(
        "demo model", lambda: Server(*flags), lambda server: os.kill(server.workers()[0], signal.SIGKILL),
        sockets, streams, 2, 16, load, load / 2.5,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="half an hour's abuse in minutes")
    parser.add_argument("--save", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "setups": []}
    for setup in (stand_in(), demo()):
        print(f"{setup.name}: {setup.sockets} sockets, {setup.streams} streams, {setup.abusers} abusers")
        print("".join(f"{name:>{len(name) + 2}}" for name in COLUMNS), flush=True)
        result = soak(setup)
        found["setups"].append(result)
        print(f"/health: {result['health']}; worker killed {result['kills']} times")
        print("\n".join(f"{count:>8} {outcome}" for outcome, count in result["outcomes"].items()))
        print("\n".join(f"FAILED {failure}" for failure in result["failures"]) or "all flat", flush=True)
        if args.save:
            args.save.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(result["failures"] for result in found["setups"]) else 0


if __name__ == "__main__":
    sys.exit(main())
