"""`aiollm trace FILE`: what a trace of `--trace FILE` says about gaps, as a table.

The share of gaps is the time that the device waited although there was work, over the time that it worked.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

LONGEST = 5  # gaps that are told one by one
ROW = "{name:<18}{iterations:>11}{device:>11}{median:>11}{p99:>11}{share:>8}{gap50:>9}{gap99:>9}{stalled:>9}"


class Iteration(NamedTuple):
    """One event of the device's track. Times are microseconds."""

    at: float
    """Its begin, after that of the server."""
    name: str
    number: int
    rows: int
    chunk_tokens: int
    stalled: int
    device_us: float
    gap_us: float
    no_work_us: float


class TraceError(Exception):
    """The file is no trace of this server; the message is for the user."""


def read(path: Path) -> list[Iteration]:
    """The iterations of a trace, in order. Raises TraceError."""
    try:
        events = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
        return [
            Iteration(
                event["ts"], event["name"], args["iteration"], args["rows"], args["chunk_tokens"], args["stalled"],
                args["device_us"], args["gap_us"], args["no_work_us"],
            )
            for event in events
            if event["ph"] == "X" and "device_us" in (args := event["args"])
        ]  # fmt: skip
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is no trace that --trace wrote: {error!r}") from error


def group(iteration: Iteration) -> tuple[bool, int]:
    """Iterations of one line: pure decoding or not, and rows up to the same power of two."""
    return iteration.chunk_tokens > 0, 1 << max(0, iteration.rows - 1).bit_length() if iteration.rows else 0


def summary(iterations: Sequence[Iteration]) -> str:
    """The table: a line in all, one for each size of batch, and the longest gaps."""
    groups: dict[tuple[bool, int], list[Iteration]] = {}
    for iteration in iterations:
        groups.setdefault(group(iteration), []).append(iteration)
    head = {
        "name": "iterations of", "iterations": "count", "device": "device s", "median": "median ms", "p99": "p99 ms",
        "share": "gaps", "gap50": "p50 us", "gap99": "p99 us", "stalled": "stalled",
    }  # fmt: skip
    lines = [ROW.format(**head), _line("all", iterations)]
    for key in sorted(groups):
        chunks, rows = key
        bounds = f"{rows // 2 + 1} to {rows}" if rows > 2 else str(rows)
        lines.append(_line(f"{'chunks, ' if chunks else ''}{bounds} rows", groups[key]))
    lines.append(f"no work for {sum(iteration.no_work_us for iteration in iterations) / 1e6:.3f} s")
    longest = sorted(iterations, key=lambda iteration: -iteration.gap_us)[:LONGEST]
    lines += [
        f"gap of {iteration.gap_us / 1e3:.3f} ms before iteration {iteration.number} ({iteration.name})"
        f" at {iteration.at / 1e6:.3f} s"
        for iteration in longest
        if iteration.gap_us
    ]
    return "\n".join(lines)


def share(iterations: Sequence[Iteration]) -> float:
    """Gaps over device time."""
    device = sum(iteration.device_us for iteration in iterations)
    return sum(iteration.gap_us for iteration in iterations) / device if device else 0.0


def _line(name: str, iterations: Sequence[Iteration]) -> str:
    device = np.array([iteration.device_us for iteration in iterations])
    gaps = np.array([iteration.gap_us for iteration in iterations])
    return ROW.format(
        name=name,
        iterations=len(iterations),
        device=f"{device.sum() / 1e6:.3f}",
        median=f"{np.median(device) / 1e3:.3f}",
        p99=f"{np.percentile(device, 99) / 1e3:.3f}",
        share=f"{share(iterations):.2%}",
        gap50=f"{np.median(gaps):.0f}",
        gap99=f"{np.percentile(gaps, 99):.0f}",
        stalled=sum(iteration.stalled > 0 for iteration in iterations),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="aiollm trace", description="sum up a trace that --trace FILE wrote")
    parser.add_argument("file", type=Path, metavar="FILE", help="may still be written")
    parser.add_argument("--begin", type=float, default=0.0, metavar="SECONDS", help="of the trace, to skip (0)")
    parser.add_argument("--end", type=float, default=float("inf"), metavar="SECONDS", help="where to stop (inf)")
    args = parser.parse_args(argv)
    try:
        found = [iteration for iteration in read(args.file) if args.begin <= iteration.at / 1e6 <= args.end]
    except TraceError as error:
        print(f"aiollm: {error}", file=sys.stderr)
        return 2
    print(summary(found) if found else "no iterations")
    return 0
