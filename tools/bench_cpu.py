"""Speed of the demo model on this machine's CPU, through a real server and real HTTP clients.

    python tools/bench_cpu.py [--save tools/results/bench_cpu.json]

Prompts of 64 tokens, 128 tokens of output, streamed, at one stream and at sixteen; the clients are a process of their
own. `plain` is greedy and runs past EOS; `all on` obeys EOS and has temperature, top_p, a seed, penalties, stop strings
and logprobs; `cached` repeats prompts whose prefix is cached. A token's time is the median over all streams of
(last - first) / (tokens - 1), and the first token's time is the median as well. Run it on a machine that is quiet.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from serving import Server

from aiollm.hub.resolve import resolve
from aiollm.text.tokenizer import Tokenizer

PROMPT, OUTPUT = 64, 128  # tokens
STREAMS = (1, 16)
PLAIN = {"temperature": 0, "ignore_eos": True}
ALL_ON = {
    "temperature": 0.8, "top_p": 0.95, "seed": 7, "presence_penalty": 0.2, "frequency_penalty": 0.2, "logprobs": 5,
    "stop": ["\n\n\n\n\n", "the end of the licence"],
}  # fmt: skip
ROW = "{data_type:<6}{run:<8}{streams:>7}{token_ms:>10}{first_ms:>13}{tokens_per_second:>10}"
# Repetitions of each run at 1 and at 16 streams.
RUNS = {
    "int8": {"plain": (4, 3), "all on": (3, 2), "cached": (3, 2)},
    "fp32": {"plain": (2, 1), "all on": (2, 1)},
}


class Figures(NamedTuple):
    token_ms: float
    first_ms: float
    tokens_per_second: float  # of all streams together, from the first request to the last token


def prompts(folder: str) -> Iterator[list[int]]:
    """Parts of the licence's text, each from another place: no two of them share a prefix."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    ids = Tokenizer.load(folder).encode(text, False)
    step = 7  # any; shared beginnings of one token are possible, and harmless
    for at in range(0, len(ids) - PROMPT, step):
        yield ids[at : at + PROMPT]


async def stream(host: str, port: int, body: dict[str, Any]) -> list[float]:
    """One streamed completion over a connection of its own -> the time of the request and of each token."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    times = [time.perf_counter()]
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            tokens = sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
            times += [time.perf_counter()] * tokens
    writer.close()
    if len(times) < 2:
        raise RuntimeError("no token came")
    return times


async def client(url: str, bodies: list[dict[str, Any]]) -> list[list[float]]:
    at = urlsplit(url)
    return await asyncio.gather(*(stream(str(at.hostname), int(at.port or 80), body) for body in bodies))


def together(url: str, prompts: list[list[int]], options: dict[str, Any]) -> list[list[float]]:
    """All prompts at once, asked by another process."""
    bodies = [
        {"prompt": prompt, "max_tokens": OUTPUT, "stream": True, "return_token_ids": True, **options}
        for prompt in prompts
    ]
    command = [sys.executable, __file__, "--client", url]
    done = subprocess.run(command, input=json.dumps(bodies).encode(), stdout=subprocess.PIPE, check=True)
    found: list[list[float]] = json.loads(done.stdout)
    return found


def figures(rounds: list[list[list[float]]]) -> Figures:
    streams = [times for each in rounds for times in each]
    rates = [
        sum(len(times) - 1 for times in each) / (max(times[-1] for times in each) - min(times[0] for times in each))
        for each in rounds
    ]
    paces = [(times[-1] - times[1]) / (len(times) - 2) for times in streams if len(times) > 2]
    return Figures(
        token_ms=round(1e3 * statistics.median(paces), 2),
        first_ms=round(1e3 * statistics.median(times[1] - times[0] for times in streams), 1),
        tokens_per_second=round(statistics.median(rates), 1),
    )


def bench(folder: str, data_type: str) -> dict[str, Any]:
    """Every run of one data type, on one server."""
    fresh = prompts(folder)
    began = time.monotonic()
    with Server("--model_dir", folder, "--data_type", data_type) as server:
        ready = time.monotonic() - began
        together(server.url, [next(fresh) for _ in range(max(STREAMS))], PLAIN)  # what the first use costs
        rows = []
        for name, repetitions in RUNS[data_type].items():
            options = ALL_ON if name == "all on" else PLAIN
            for streams, repeat in zip(STREAMS, repetitions, strict=True):
                batch = [next(fresh) for _ in range(streams)]
                rounds = []
                for _ in range(repeat):
                    if name == "cached":
                        together(server.url, batch, {**PLAIN, "max_tokens": 2})
                    else:
                        batch = [next(fresh) for _ in range(streams)]
                    rounds.append(together(server.url, batch, options))
                row = {"data_type": data_type, "run": name, "streams": streams, **figures(rounds)._asdict()}
                print(ROW.format(**row), flush=True)
                rows.append(row)
        process = Path(f"/proc/{server.process.pid}")
        resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return {
            "rows": rows,
            "ready_seconds": round(ready, 2),
            "server_mib": int(resident.split()[1]) >> 10,
            "server_has_torch": "libtorch" in (process / "maps").read_text(),
            "worker_peak_mib": server.peak_memory() >> 20,
        }


def machine() -> dict[str, Any]:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="speed of the demo model on this machine's CPU")
    parser.add_argument("--save", type=Path, help="write the table as JSON")
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(json.dumps(asyncio.run(client(args.client, json.load(sys.stdin)))))
        return 0
    found: dict[str, Any] = {"machine": machine()}
    folder = resolve(None, progress=lambda phase, fraction: None).folder
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print(f"{'type':<6}{'run':<8}{'streams':>7}{'ms/token':>10}{'ms to first':>13}{'tokens/s':>10}")
    for data_type in RUNS:
        found[data_type] = bench(folder, data_type)
        print("      ready in {ready_seconds} s; server {server_mib} MiB, torch in it: {server_has_torch};"
              " worker {worker_peak_mib} MiB".format(**found[data_type]))  # fmt: skip
    from perplexity import perplexities  # loads torch, which would disturb the runs above

    found["perplexity"] = {name: round(value, 4) for name, value in perplexities(Path(folder)).items()}
    print("perplexity: fp32 {fp32}, int8 {int8}".format(**found["perplexity"]))
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
