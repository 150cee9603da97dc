#!/usr/bin/env python3
"""What the hardware counts while the kernels of a decode step of 256 rows run, by Nsight Compute (ncu).

    ncu --profile-from-start off --metrics $(python tools/counters.py --metrics) --csv --page raw \\
        python tools/counters.py --run > counters.csv
    python tools/counters.py --read counters.csv --save tools/results/counters_256x320.json

Each kernel runs once with cold caches. Shares are of what the card can do at most.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

from aiollm.kernels.workload import SHAPES, cases

CASES = {
    "linear": ("qkv 256 rows", "o 256 rows", "down 256 rows"), "gated_linear": ("gate_up 256 rows",),
    "attention": ("256 x 320",),
}  # fmt: skip
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "memory read MB": ("dram__bytes_read.sum", 1e-6),
    "memory share %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "L2 share %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "L2 to SMs MB": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1e-6),
    "SM share %": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "programs": ("launch__grid_size", 1),
    "registers": ("launch__registers_per_thread", 1),
}
FLUSH = 256 << 20  # bytes that are written before each kernel: five times the L2


def run() -> None:
    """Run the cases, so that ncu sees each of their kernels once."""
    device = torch.device("cuda")
    chosen = [case for case in cases(SHAPES["qwen3-8b"]) if case.label in CASES.get(case.op, ())]
    arguments = [case.make(device) for case in chosen]
    for case, given in zip(chosen, arguments, strict=True):
        case.run(given)
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    for case, given in zip(chosen, arguments, strict=True):
        flush.zero_()
        case.run(given)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def read(path: Path) -> list[dict[str, Any]]:
    """The kernels in the order in which they ran, each with its METRICS; the writes between them are left out."""
    lines = csv.reader(line for line in path.read_text().splitlines() if line.startswith('"'))
    names = next(lines)
    next(lines)  # units: ncu gives base units
    found = []
    for values in lines:
        row = dict(zip(names, values, strict=True))
        if "FillFunctor" not in row["Kernel Name"]:
            figures = {
                name: round(float(row[metric].replace(",", "")) * factor, 2)
                for name, (metric, factor) in METRICS.items()
            }
            found.append({"kernel": row["Kernel Name"], **figures})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metrics", action="store_true", help="print what ncu is to count")
    what.add_argument("--run", action="store_true", help="run the kernels, under ncu")
    what.add_argument("--read", type=Path, metavar="CSV", help="show what ncu wrote")
    parser.add_argument("--save", type=Path, help="write it as JSON")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(metric for metric, _ in METRICS.values()))
    elif options.run:
        run()
    else:
        found = read(options.read)
        print(f"{'kernel':48}" + "".join(f"{name:>16}" for name in METRICS))
        for row in found:
            print(f"{row['kernel'][:47]:48}" + "".join(f"{row[name]:16.2f}" for name in METRICS))
        if options.save:
            options.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
