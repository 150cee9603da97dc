"""The speed of the server on this GPU beside vLLM's on an H100, row by row: tools/baselines.json has the figures.

    python tools/bench_gpu.py [--shapes qwen3-8b] [--workloads single decode-256] [--real-life] [--save FILE] [-- FLAGS]

Starts `aiollm serve` with dummy weights and the flags of that file, FLAGS behind them, and runs `aiollm bench serve
--workload NAME` for each row. A ratio above 1 is better than vLLM, whichever way the figure runs. A row that fails or
takes too long is told, and the next one runs, on a new server where the old one died. FILE is written after each row.
`gaps` is the time that the device waited over the time that it worked: by the server's figures, which count waiting for
work too, or with --traces by each row's part of the trace, which does not.
Measure on an H100, or the ratios mean nothing; a line says so where the card was slowed down by more than its power
limit. Rows with `+real` have the ratio to the same row without real life.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from card import Card
from serving import Server
from shapes import SHAPES, write

from aiollm import trace

BASELINES = json.loads((Path(__file__).parent / "baselines.json").read_text(encoding="utf-8"))
NO_CACHE = "--disable_dynamic_prompt_cache"  # vLLM's figures were taken without; real life is measured with
WARM_UP = "smoke"
TICKS = os.sysconf("SC_CLK_TCK")
LINE = (
    "{shape:<12} {workload:<19} {metric:<18} {vllm:>9}{must:>9}{measured:>11}{ratio:>8}{kept:>6}"
    "{server:>8}{lag:>8}{gaps:>7}"
)


class RowFailed(Exception):
    """One row has no figures; the message says why."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Look:
    """What the server tells of itself at one moment."""

    def __init__(self, server: Server) -> None:
        self.cpu = cpu_seconds(server.process.pid)
        self.workers_cpu = sum(cpu_seconds(pid) for pid in server.workers())
        text = server.get("/metrics")[1]
        samples = re.findall(r"^aiollm_(\w+)(?:\{le=\"([^\"]+)\"\})? (\S+)$", text, re.MULTILINE)
        self.values = {(name, bound): float(value) for name, bound, value in samples}

    def since(self, before: "Look", seconds: float) -> dict[str, Any]:
        """Shares of a core, the loop's lateness and the device's idle share between two looks."""

        def grown(name: str, bound: str = "") -> float:
            return self.values.get((name, bound), 0.0) - before.values.get((name, bound), 0.0)

        lags = [bound for name, bound in self.values if name == "event_loop_lag_seconds_bucket"]
        looks = grown("event_loop_lag_seconds_count")

        def lag(share: float) -> float | None:
            """Milliseconds that this share of the looks stayed within: the bound of a bucket."""
            within = (bound for bound in lags if grown("event_loop_lag_seconds_bucket", bound) >= share * looks)
            return 1e3 * float(next(within)) if looks else None

        idle, device = grown("device_idle_seconds_total"), grown("iteration_seconds_sum")
        return {
            "server_cpu_share": round((self.cpu - before.cpu) / seconds, 3),
            "worker_cpu_share": round((self.workers_cpu - before.workers_cpu) / seconds, 3),
            "loop_lag_p50_ms": lag(0.5),
            "loop_lag_p99_ms": lag(0.99),
            "iterations": grown("iteration_seconds_count"),
            "device_seconds": round(device, 3),
            "device_gap_share": round(idle / device, 4) if device else None,
        }


def run_row(server: Server, workload: str, real_life: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one named load, with what the server told meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [
            sys.executable, "-P", "-m", "aiollm", "bench", "serve", "--base-url", server.url, "--workload", workload,
            "--procs", str(options.procs), "--metric-percentiles", "50,90,99", "--result-filename", str(result),
            "--token-ids", options.token_ids, *(["--real-life"] if real_life else []),
        ]  # fmt: skip
        before = Look(server)
        # A session of its own: at the time limit its clients end with it.
        bench = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            with Card() as card:
                _, said = bench.communicate(timeout=options.row_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(bench.pid, signal.SIGKILL)
            bench.communicate()
            raise RowFailed(f"not done after {options.row_seconds:g} s (--row-seconds)") from None
        if not result.exists():
            raise RowFailed(f"bench serve ended with {bench.returncode}: {said.strip()[-500:]}")
        figures: dict[str, Any] = json.loads(result.read_text())
        figures |= Look(server).since(before, figures["duration"])
        figures |= {"card": card.summary()}
    if figures["failed"]:
        raise RowFailed(f"{figures['failed']} requests failed: {said.strip()[-500:]}")
    return figures


def compared(baseline: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """A figure beside vLLM's and what it must be."""
    measured = figures[baseline["metric"]]
    higher = baseline["better"] == "higher"
    return baseline | {
        "measured": measured,
        "ratio": round(measured / baseline["vllm"] if higher else baseline["vllm"] / measured, 3),
        "kept": measured >= baseline["must"] if higher else measured <= baseline["must"],
    }


def beside(plain: float, figures: dict[str, Any]) -> dict[str, Any]:
    """What is left of the output of the same row without real life."""
    measured = figures["output_throughput"]
    return {"metric": "output_throughput", "measured": measured, "plain": plain, "ratio": round(measured / plain, 3)}


def show(row: dict[str, Any]) -> None:
    """The lines of one row; one without a baseline shows its throughput."""
    shape, workload = row["shape"], f"{row['workload']}{'+real' if row.get('real_life') else ''}"
    if "error" in row:
        print(f"{shape:<12} {workload:<19} FAILED: {row['error']}", flush=True)
        return
    found, comparisons = row["figures"], row["compared"]
    if not comparisons and row["workload"] != "start":
        comparisons = [{"metric": "output_throughput", "measured": found["output_throughput"]}]
    for comparison in comparisons:
        print(
            LINE.format(
                shape=shape,
                workload=workload,
                metric=comparison["metric"],
                vllm=comparison.get("vllm", "-"),
                must=comparison.get("must", "-"),
                measured=f"{comparison['measured']:.2f}",
                ratio=comparison.get("ratio", "-"),
                kept={True: "yes", False: "NO", None: "-"}[comparison.get("kept")],
                server=_percent(found.get("server_cpu_share")),
                lag="-" if found.get("loop_lag_p99_ms") is None else f"{found['loop_lag_p99_ms']:g}",
                gaps=_percent(found.get("device_gap_share")),
            ),
            flush=True,
        )
    if slowed := found.get("card", {}).get("slowed_share"):
        print(f"{shape:<12} {workload:<19} the card was slowed down by heat or its supply for {slowed:.0%} of the time")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


class Session:
    """Rows of one shape on one kind of server, which is started again where it died."""

    def __init__(
        self, shape: str, flags: list[str], options: argparse.Namespace, plain: dict[str, float] | None = None
    ) -> None:
        """`plain` has the output tokens per second of rows without real life, where this session is one with."""
        self._shape, self._flags, self._options, self._plain = shape, flags, options, plain
        self._real_life = plain is not None
        self._server: Server | None = None
        self._starts = 0
        self._broken = ""
        self._trace: Path | None = None
        self._traced = 0  # iterations of the rows before
        self.start: dict[str, Any] = {}

    def row(self, workload: str) -> dict[str, Any]:
        """One row as it is saved; `error` where it has no figures."""
        row: dict[str, Any] = {"shape": self._shape, "workload": workload, "real_life": self._real_life}
        try:
            server = self._living()
            figures = self.start if workload == "start" else run_row(server, workload, self._real_life, self._options)
            if self._trace is not None:
                figures |= self._gaps()
            if self._plain is None:
                baselines = BASELINES["shapes"].get(self._shape, {}).get(workload, [])
                comparisons = [compared(baseline, figures) for baseline in baselines]
            else:
                comparisons = [beside(self._plain[workload], figures)] if workload in self._plain else []
            return row | {"figures": figures, "compared": comparisons}
        except (RowFailed, trace.TraceError, RuntimeError, OSError, KeyError, ValueError) as error:
            said = str(error) or type(error).__name__
            if self._server is not None and self._server.process.poll() is not None:
                said += f"; the server ended with {self._server.process.poll()}:\n{self._server.log()[-2000:]}"
            return row | {"error": said}

    def close(self) -> None:
        if self._server is not None:
            self._server.__exit__()
            self._server = None

    def _gaps(self) -> dict[str, Any]:
        """What the trace says of the iterations since the last row."""
        assert self._trace is not None
        every = trace.read(self._trace)
        own, self._traced = every[self._traced :], len(every)
        if not own:
            return {}
        return {"device_gap_share": round(trace.share(own), 4), "trace": trace.summary(own).splitlines()}

    def _living(self) -> Server:
        if self._broken:
            raise RowFailed("the server does not start, as is said above")
        if self._server is not None and self._server.process.poll() is not None:
            self.close()
        if self._server is None:
            self._starts += 1
            flags = list(self._flags)
            if self._options.traces:
                life = "-real" if self._real_life else ""
                self._trace = self._options.traces / f"{self._shape}{life}-{self._starts}.json"
                self._traced = 0
                flags += ["--trace", str(self._trace)]
            began = time.monotonic()
            server = Server(*flags, patience=self._options.start_seconds)
            try:
                server.__enter__()
            except RuntimeError as error:
                server.__exit__()
                self._broken = str(error)
                raise
            self._server = server
            held = re.search(r"the KV cache holds ([\d,]+) tokens", server.log())
            self.start = {
                "ready_seconds": round(time.monotonic() - began, 2),
                "kv_tokens": int(held[1].replace(",", "")) if held else None,
                "log": server.log(),
            }
            run_row(server, WARM_UP, self._real_life, self._options)
        return self._server


def machine() -> dict[str, Any]:
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    return {
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "aiohttp", "uvloop", "msgspec")},
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """A tool's own arguments, and the server's flags, which stand behind `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def main() -> int:
    argv, flags = divided(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["qwen3-8b"], help="(qwen3-8b)")
    parser.add_argument("--model", help="a model of your own instead of a shape; its name is the shape's in the table")
    parser.add_argument("--workloads", nargs="+", help="rows (those of baselines.json); `start` is always the first")
    parser.add_argument("--real-life", action="store_true", help="each row again as users' requests are")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each row (1)")
    parser.add_argument("--procs", type=int, default=4, help="client processes (4)")
    parser.add_argument("--token-ids", default="300:40000", help="of prompts, LOW:HIGH (300:40000)")
    parser.add_argument("--row-seconds", type=float, default=300, help="limit of one row (300)")
    parser.add_argument("--start-seconds", type=float, default=300, help="limit of a server's start (300)")
    parser.add_argument("--seconds", type=float, default=1e9, help="no row begins after so many seconds")
    parser.add_argument("--no-baseline-flags", action="store_true", help="start the server with FLAGS alone")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep the trace of each server, summed up by row")
    parser.add_argument("--save", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    flags = [*([] if args.no_baseline_flags else BASELINES["flags"]), *flags]
    found: dict[str, Any] = {"machine": machine(), "flags": flags, "rows": []}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    head = {"server": "server", "lag": "lag ms", "gaps": "gaps", "kept": "must?"}
    names = ("shape", "workload", "metric", "vllm", "must", "measured", "ratio")
    print(LINE.format(**{name: name for name in names}, **head), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in [args.model] if args.model else args.shapes:
            model = args.model or str(write(Path(folder, shape), SHAPES[shape]))
            workloads = args.workloads or [*BASELINES["shapes"].get(shape, {"smoke": []})]
            plain: dict[str, float] = {}
            for real_life in (False, True) if args.real_life else (False,):
                own = [flag for flag in flags if not (real_life and flag == NO_CACHE)]
                name = Path(shape).name
                session = Session(name, ["--model_dir", model, *own], args, plain if real_life else None)
                try:
                    for workload in ["start", *(name for name in workloads if name != "start")]:
                        for _ in range(1 if workload == "start" else args.repeat):
                            if time.monotonic() > deadline:
                                row = {"shape": shape, "workload": workload, "error": "no time left (--seconds)"}
                            else:
                                row = session.row(workload)
                            show(row)
                            found["rows"].append(row)
                            if not real_life and "output_throughput" in row.get("figures", {}):
                                plain[workload] = row["figures"]["output_throughput"]
                            if args.save:
                                args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                finally:
                    session.close()
    return 1 if any("error" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
