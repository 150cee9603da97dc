"""What every fault must leave behind: a server that is as it was before."""

import contextlib
import os
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from serving import Server

CONTEXT = 2048
FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--running_max_req_size", "16")
QUICK = 0.05  # seconds for /health, less those in which others had the core
GROWTH = 50 << 20  # bytes
POOL = (os.cpu_count() or 1) + 4  # threads that asyncio starts for work beside the loop, and keeps
SECONDS = 20  # until a fault has to be over


class Figures(NamedTuple):
    descriptors: int
    threads: int
    memory: int
    """The most that was ever resident, of the server and its workers together, in bytes."""


def figures(server: Server) -> Figures:
    pid = server.process.pid
    return Figures(
        len(os.listdir(f"/proc/{pid}/fd")),
        len(os.listdir(f"/proc/{pid}/task")),
        sum(peak(process) for process in (pid, *server.workers())),
    )


def peak(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def seconds_of_health(server: Server) -> float:
    """Without the time for which the server's event loop, or this process, had to wait for a core."""
    processes = server.process.pid, os.getpid()
    began, waited = time.monotonic(), sum(map(waiting, processes))
    assert server.get("/health")[0] == 200
    return time.monotonic() - began - (sum(map(waiting, processes)) - waited)


def waiting(pid: int) -> float:
    """Seconds for which the first thread of a process was ready to run and did not, so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


@contextlib.contextmanager
def calm(server: Server) -> Iterator[None]:
    """After the block /health answers soon, nothing runs or waits, every slot and descriptor is back, the workers live,
    and memory has not grown."""
    before = figures(server)
    yield
    # Where one look was late two more must not be: the hostile client takes its time from what is measured.
    if seconds_of_health(server) >= QUICK:
        assert max(seconds_of_health(server), seconds_of_health(server)) < QUICK
    until(lambda: server.get("/ready")[0] == 200)
    until(lambda: under_way(server) == 0)
    assert server.metric("aiollm_kv_cache_usage_perc") == 0
    until(lambda: figures(server).descriptors <= before.descriptors)
    until(lambda: figures(server).memory - before.memory < GROWTH)  # what is garbage goes while nobody is served
    assert figures(server).threads <= before.threads + POOL
    assert "Traceback" not in server.log()


def warm_up(server: Server) -> None:
    """Let it take once the memory that big bodies and prompts need: what is taken for the next ones is growth."""
    server.post("/v1/completions", {"prompt": "warm", "max_tokens": 20})
    for letter in "a é 👩":
        with contextlib.suppress(urllib.error.HTTPError):  # it is too long
            server.post("/v1/completions", {"prompt": letter * (1_000_000 // len(letter.encode()))})


def under_way(server: Server) -> float:
    """Choices that run or wait."""
    return server.metric("aiollm_num_requests_running") + server.metric("aiollm_num_requests_waiting")


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
