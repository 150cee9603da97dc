"""How fast the operations are on the GPU that is here, beside what it can do at best: python -m aiollm.kernels.bench

Nothing is timed before every chosen case agrees with the reference. The floor of a call is the larger of two times:
its fewest bytes at the bandwidth of a copy, its operations at the rate of a large product, both measured in this run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from aiollm.kernels import device, measure, workload
from aiollm.kernels.measure import Ceilings
from aiollm.kernels.workload import Case


class Row(NamedTuple):
    """One case; times in microseconds."""

    op: str
    label: str
    us: float
    reference_us: float
    bytes: int
    flops: int
    floor_us: float

    @property
    def share(self) -> float:
        """1 where the call takes no longer than it must."""
        return self.floor_us / self.us


def wrong(cases: Sequence[Case], here: torch.device) -> list[str]:
    """What disagrees with the reference, a text for each such case."""
    found = []
    for case in cases:
        try:
            measure.check(case, here, measure.expectation(case, here))
        except AssertionError as error:
            found.append(str(error))
    return found


def timed(case: Case, here: torch.device, ceilings: Ceilings) -> Row:
    """The row of a case that was found right."""
    us, reference_us = measure.microseconds(case, here), measure.reference_microseconds(case, here)
    return Row(case.op, case.label, us, reference_us, case.bytes, case.flops, floor_us(case, ceilings))


def floor_us(case: Case, ceilings: Ceilings) -> float:
    """The least time of a call in microseconds: moving its bytes, or computing, whichever takes longer."""
    return max(case.bytes / ceilings.copy, case.flops / ceilings.matmul) * 1e6


def line(row: Row) -> str:
    """A row of the table."""
    rates = (f"{row.bytes / row.us / 1e6:6.2f} TB/s", f"{row.flops / row.us / 1e6:6.0f} TFLOP/s" if row.flops else "")
    times = f"{row.us:10.2f} us {row.floor_us:10.2f} us {row.share:6.0%} {row.reference_us:12.1f} us"
    return f"{row.op:14} {row.label:40} {times}  {'  '.join(rates)}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aiollm.kernels.bench", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("chosen", nargs="*", help="modules or operations; without them all")
    parser.add_argument("--model", default="qwen3-8b", metavar="FOLDER", help="a model's folder, or a known shape")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(argv)
    try:
        cases = list(workload.cases(workload.shape(options.model), options.chosen))
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed, and none is visible")
    here = device.current()
    facts = measure.facts(here)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if failures := wrong(cases, here):
        print("\n".join(failures), file=sys.stderr)
        print(f"{len(failures)} of {len(cases)} cases are wrong: no times", file=sys.stderr)
        return 1
    ceilings = measure.ceilings(here)
    print(f"copy {ceilings.copy / 1e12:.2f} TB/s, bf16 product {ceilings.matmul / 1e12:.0f} TFLOP/s")
    print(f"{'op':14} {'case':40} {'time':>13} {'floor':>13} {'share':>6} {'reference':>15}", flush=True)
    rows = []
    for case in cases:
        rows.append(timed(case, here, ceilings))
        print(line(rows[-1]), flush=True)
    if options.save:
        figures = [row._asdict() | {"share": round(row.share, 3)} for row in rows]
        content = {**facts, "model": options.model, "ceilings": ceilings._asdict(), "cases": figures}
        options.save.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
