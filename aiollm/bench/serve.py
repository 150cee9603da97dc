"""`aiollm bench serve`: puts load on any OpenAI-compatible server and prints what it took, with vLLM's option names.

    aiollm bench serve --workload decode-256
    aiollm bench serve --random-input-len 512 --random-output-len 128 --max-concurrency 1 8 64 --plot load.png

Several client processes share the load, so that the client is not what is measured. Prompts are random token ids, which
every server reads alike, and EOS is ignored: all servers do the same work.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec

from aiollm.bench import plot, sharegpt
from aiollm.bench.client import Outcome, Report, Setup
from aiollm.bench.options import BACKENDS, drawn, parse, points, workload
from aiollm.bench.report import detailed, figures, table
from aiollm.bench.workloads import Draw, Job, LoadError, Ramp, Turn, Workload, fixed, jobs, shuffled

# What requests of real users carry. The stop strings hardly ever come, so that the work stays the same.
REAL_LIFE: dict[str, Any] = {
    "ignore_eos": False, "temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.2, "frequency_penalty": 0.2,
    "logprobs": 5, "stop": ["\n\n\n\n\n", "the end of the answer"],
}  # fmt: skip
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs",
    "ignore_eos",
)  # fmt: skip
PROGRESS_SECONDS = 1.0  # between two counts of requests on a terminal
START_SECONDS = 0.2  # from the last client's word that it is ready to the first request
CLIENT = ("-P", "-m", "aiollm.bench.client")
LINE_LIMIT = 1 << 30  # bytes of a client's report


class Target(NamedTuple):
    """Whom to ask, and what all requests say."""

    url: str
    headers: dict[str, str]
    body: dict[str, Any]
    chat: bool
    timeout: float
    seeds: bool


def main(argv: Sequence[str]) -> int:
    """Run every point of the load; the exit status is 1 where no request of a point succeeded."""
    args = parse(argv)
    try:
        if args.plot:
            plot.check()
        loads = [workload(args, point) for point in range(points(args))]
        found = asyncio.run(runs(args, loads))
        if args.plot:
            plot.draw(args.plot, found)
            print(f"drawn in {args.plot}", file=sys.stderr)
    except LoadError as error:
        print(f"aiollm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if all(run["completed"] for run in found) else 1


async def runs(args: argparse.Namespace, loads: Sequence[Workload]) -> list[dict[str, Any]]:
    """Run the points of a load in turn, print each one's table, and return their figures. Raises LoadError."""
    root = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/").removesuffix("/v1")
    if urlsplit(root).scheme not in ("http", "https"):
        raise LoadError(f"--base-url: {root} is no address like http://127.0.0.1:8000")
    headers = dict(args.header)
    given = args.model or args.served_model_name
    model = await _ask_model(root, headers, args.ready_check_timeout_sec, given)
    name = args.served_model_name or model
    target = Target(
        root + (args.endpoint or BACKENDS[args.backend]), headers, body_of(args, name),
        args.backend == "openai-chat", args.timeout, args.real_life,
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    conversations = await _conversations(args, loads[0].requests, root, headers, name)
    for point, load in enumerate(loads):
        work = drawn(args, load, point, conversations)
        if args.num_warmups:
            warm = jobs(Workload(args.num_warmups, args.num_warmups, None, fixed(32, 16)), Draw(0, *args.token_ids))
            if target.chat:
                warm = drawn(args, load, len(loads), conversations)[: args.num_warmups]  # as of one more point
            await _run(target, warm, load.concurrency or args.num_warmups, args)
        outcomes, began, shares = await _run(target, work, load.concurrency, args)
        facts = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "backend": args.backend,
            "label": args.label or args.backend,
            "model_id": model,
            "workload": args.workload,
            "dataset_name": args.dataset_name,
            "real_life": args.real_life,
            "num_prompts": len(outcomes),
            "request_rate": load.rate if load.rate is not None else "inf",
            **_ramp_facts(load.ramp),
            "burstiness": args.burstiness,
            "max_concurrency": load.concurrency,
            "client_processes": len(shares),
            "client_cpu_share": max(shares),
            "percentiles": args.metric_percentiles,
            **dict(args.metadata),
        }
        run = facts | figures(outcomes, began, args.metric_percentiles, dict(args.goodput))
        print(table(run, args.percentile_metrics, args.metric_percentiles), flush=True)
        for error, count in _errors(outcomes):
            print(f"{count} x {error}", file=sys.stderr)
        if args.save_result or args.save_detailed or args.append_result or args.result_filename:
            _save(args, run | (detailed(outcomes) if args.save_detailed else {}), first=not found)
        found.append(run)
    return found


def _ramp_facts(ramp: Ramp | None) -> dict[str, Any]:
    if ramp is None:
        return {}
    return {"ramp_up_strategy": ramp.strategy, "ramp_up_start_rps": ramp.start, "ramp_up_end_rps": ramp.end}


def body_of(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What all requests have in common: what is asked for wins over what real life has, and that over our defaults."""
    asked = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    sampling = {"temperature": 1.0, "ignore_eos": True} | (REAL_LIFE if args.real_life else {}) | asked
    if args.backend == "openai-chat" and "logprobs" in sampling:
        sampling |= {"logprobs": True, "top_logprobs": sampling["logprobs"]}
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    return {**common, **sampling, **args.extra_body}


async def _conversations(
    args: argparse.Namespace, wanted: int, root: str, headers: dict[str, str], model: str
) -> list[Turn]:
    """Those of a file of ShareGPT; none where that is not asked for, or the file holds lengths."""
    path = args.dataset_path if args.dataset_name == "sharegpt" else None
    said = sharegpt.read(path) if path else None
    if said is None:
        return []
    if not args.disable_shuffle:
        said = shuffled(said, args.seed)
    return await sharegpt.ask(said, wanted, args.sharegpt_output_len, root, headers, model)


async def _ask_model(root: str, headers: dict[str, str], patience: float, given: str | None) -> str:
    """The name of the model that is served, or the one that is given, once the server has loaded it. Where a name is
    given nothing has to list it."""
    if given and not patience:
        return given
    deadline = time.monotonic() + patience
    said = False
    async with aiohttp.ClientSession(headers=headers) as session:
        while True:
            try:
                async with session.get(root + "/v1/models") as response:
                    if response.status == 200:
                        listed = (await response.json())["data"]
                        if not listed or listed[0].get("max_model_len", 1) is not None:  # None: it still loads
                            return given or str(listed[0]["id"])
                    elif response.status != 503:
                        if given:
                            return given
                        raise LoadError(f"{root}/v1/models answers {response.status}; see --header and --model")
                    problem = "is still loading"
            except (aiohttp.ClientError, OSError) as error:
                problem = f"cannot be reached: {error}"
            except (KeyError, IndexError, ValueError, TypeError) as error:
                if given:
                    return given
                raise LoadError(f"{root}/v1/models names no model; see --model") from error
            if time.monotonic() >= deadline:
                raise LoadError(f"the server at {root} {problem}; see --base-url and --ready-check-timeout-sec")
            if not said:
                print(f"waiting: the server at {root} {problem}", file=sys.stderr)
                said = True
            await asyncio.sleep(0.2)


async def _run(
    target: Target, work: Sequence[Job], concurrency: int | None, args: argparse.Namespace
) -> tuple[list[Outcome], float, list[float]]:
    """Outcomes, second of the start, and each client's share of a core."""
    procs = min(args.procs, concurrency or len(work), len(work))
    setups = [
        Setup(
            target.url, target.headers, target.body, target.chat,
            None if concurrency is None else concurrency // procs + (number < concurrency % procs),
            target.timeout, number << 24 if target.seeds else None, list(work[number::procs]),
        )
        for number in range(procs)
    ]  # fmt: skip
    pipe = asyncio.subprocess.PIPE
    clients = [
        await asyncio.create_subprocess_exec(sys.executable, *CLIENT, stdin=pipe, stdout=pipe, limit=LINE_LIMIT)
        for _ in setups
    ]
    try:
        for client, setup in zip(clients, setups, strict=True):
            await _tell(client, msgspec.json.encode(setup))
        for client in clients:
            await _line(client)  # ready
        began = time.monotonic() + START_SECONDS
        for client in clients:
            await _tell(client, repr(began).encode())
        shown = sys.stderr.isatty() and not args.disable_tqdm
        progress = Progress(sum(len(job.turns) for job in work), len(clients), shown)
        reports = await asyncio.gather(*(_report(client, at, progress) for at, client in enumerate(clients)))
        progress.close()
    finally:
        for client in clients:
            if client.returncode is None:
                client.kill()
            await client.wait()
    return (
        [outcome for report in reports for outcome in report.outcomes], began,
        [report.cpu_share for report in reports],
    )  # fmt: skip


async def _tell(client: asyncio.subprocess.Process, line: bytes) -> None:
    assert client.stdin is not None
    client.stdin.write(line + b"\n")
    await client.stdin.drain()


async def _line(client: asyncio.subprocess.Process) -> bytes:
    assert client.stdout is not None
    line = await client.stdout.readline()
    if not line:
        raise LoadError("a client process ended early; what it said stands above")
    return line


async def _report(client: asyncio.subprocess.Process, at: int, progress: "Progress") -> Report:
    while not (line := await _line(client)).startswith(b"{"):
        progress.set(at, int(line))
    report = msgspec.json.decode(line, type=Report)
    await client.wait()
    return report


class Progress:
    """Requests that have ended, redrawn once a second where they are `shown`."""

    def __init__(self, total: int, clients: int, shown: bool) -> None:
        self._ended, self._total, self._shown = [0] * clients, total, shown
        self._began = self._drawn = time.monotonic()

    def set(self, client: int, ended: int) -> None:
        self._ended[client] = ended
        now = time.monotonic()
        if self._shown and now - self._drawn >= PROGRESS_SECONDS:
            self._drawn = now
            text = f"\r{sum(self._ended)} of {self._total} requests, {now - self._began:.0f} s "
            print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._drawn > self._began:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def _errors(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    """The commonest errors."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            counts[outcome.error] = counts.get(outcome.error, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:5]


def _save(args: argparse.Namespace, run: dict[str, Any], first: bool) -> None:
    """A file of one run is JSON; further runs are lines behind it."""
    pace = f"{run['request_rate']}qps"
    if args.ramp_up_strategy:
        pace = f"ramp-up-{args.ramp_up_strategy}-{args.ramp_up_start_rps:g}qps-{args.ramp_up_end_rps:g}qps"
    at_once = f"-concurrency{run['max_concurrency']}" if run["max_concurrency"] is not None else ""
    load = args.workload or pace + at_once
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = args.result_filename or f"{run['label']}-{load}-{Path(run['model_id']).name}-{stamp}.json"
    path = args.result_dir / name
    try:
        args.result_dir.mkdir(parents=True, exist_ok=True)
        with path.open("a" if args.append_result or not first else "w", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
    except OSError as error:
        raise LoadError(f"--result-filename: {path} cannot be written: {error.strerror}") from error
    print(f"saved in {path}", file=sys.stderr)
