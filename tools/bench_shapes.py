"""Well-known shapes on this GPU, each figure as a share of its floor: start, a stream alone, 256 streams.

    python tools/bench_shapes.py [--shapes llama-3.1-8b phi-4] [--seconds 540] [--save FILE] [-- FLAGS]

Each shape gets a server of its own with dummy weights, started with the flags of tools/baselines.json and FLAGS behind
them, and the named loads `single` (128 tokens in, 256 out, one at a time) and `decode-256` (256 at once, 64 in, 512
out). A shape takes some 45 s on an H100: 20 to 25 s until it is ready, for its kernels are compiled, 3 s of a first
load, 9 s and 10 s of these. What fails is told, and the next one runs. FILE is written after each row.

The floor of a token is that of one decode step: the larger of the bytes that it must read at the rate of a copy, all
weights of the layers and of the output layer once and the keys and values that each row sees, and of its operations at
the rate of a large product. Rows see as much as they do on average over an output, in each layer its window at most.
Both rates are measured before the first server starts, in a process that ends then. Prompts are in no floor.

The floor of a start is what nobody can do without who serves with torch: a process that imports it and makes a CUDA
context, measured with all files in the page cache, and then each weight written once at the rate of a copy.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_gpu import BASELINES, Session, divided, machine
from shapes import SHAPES, write

from aiollm.bench.workloads import WORKLOADS
from aiollm.workers.families.registry import describe
from aiollm.workers.model.parameters import parameters
from aiollm.workers.model.spec import DecoderSpec

DEFAULT = ["llama-3.1-8b", "mistral-7b", "gemma-2-9b", "phi-4", "qwen2.5-7b", "command-r7b"]
ROWS = ("start", "single", "decode-256")
NUMBER = 2  # bytes: --data_type bf16 is among the flags
LIMIT = 120.0  # seconds of one row, and of one start
LINE = "{shape:<13} {row:<11} {measured:>10} {floor:>10} {share:>7} {rate:>12}"
BARE = "import torch; torch.zeros(1, device='cuda')"
RATES = """
import json, torch
from aiollm.kernels import measure
print(json.dumps(measure.ceilings(torch.device("cuda"))._asdict()))
"""


class Ceilings(NamedTuple):
    """What this machine reaches at best."""

    copy: float  # bytes/s, read plus written
    matmul: float  # floating-point operations/s in bf16
    bare: float  # seconds until a process has imported torch and made a CUDA context


def ceilings() -> Ceilings:
    """Measured here and now; no memory of the GPU is held afterwards. Errors: subprocess.CalledProcessError."""
    rates = json.loads(subprocess.run([sys.executable, "-P", "-c", RATES], stdout=subprocess.PIPE, check=True).stdout)
    began = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", BARE], check=True)
    return Ceilings(**rates, bare=time.monotonic() - began)


def weights(spec: DecoderSpec) -> tuple[int, int]:
    """How many numbers there are, and how many of them a decode step reads: of an embedding only the rows' own."""
    sizes = {parameter.name: math.prod(parameter.shape) for parameter in parameters(spec, 0, 1)}
    looked_up = {"positions"} if spec.tied_head else {"embedding", "positions"}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name not in looked_up)


def step_floor(spec: DecoderSpec, rows: int, prompt: int, output: int, best: Ceilings) -> float:
    """Seconds of a decode step of `rows`, on average over an output of `output` tokens behind `prompt` tokens."""
    contexts = range(prompt + 1, prompt + output)  # the first token of an output comes with the prompt
    windows = [spec.reach(layer)[1] or spec.max_position for layer in range(spec.layers)]
    seen = sum(min(context, window) for window in windows for context in contexts) / len(contexts)  # in all layers
    read = weights(spec)[1]
    moved = NUMBER * (read + rows * seen * 2 * spec.kv_heads * spec.head_dim)
    operations = 2 * rows * (read + 2 * seen * spec.heads * spec.head_dim)
    return max(moved / best.copy, operations / best.matmul)


def beside_floor(row: dict[str, Any], spec: DecoderSpec, best: Ceilings) -> dict[str, Any]:
    """A row of bench_gpu.Session with `measured`, its `floor` and the `share` of it; one that failed as it is."""
    if "error" in row:
        return row
    if row["workload"] == "start":
        measured = row["figures"]["ready_seconds"]
        floor, unit = best.bare + NUMBER * weights(spec)[0] / best.copy, "s"
    else:
        load = WORKLOADS[row["workload"]]
        assert load.concurrency is not None and callable(load.lengths)
        prompt, output = load.lengths(None)  # type: ignore[arg-type]  they are fixed
        measured = row["figures"]["median_tpot_ms"]
        floor, unit = 1e3 * step_floor(spec, load.concurrency, prompt, output, best), "ms"
    return row | {"measured": measured, "floor": round(floor, 4), "unit": unit, "share": round(floor / measured, 3)}


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['shape']:<13} {row['workload']:<11} FAILED: {row['error']}", flush=True)
        return
    rate = row["figures"].get("output_throughput")
    print(
        LINE.format(
            shape=row["shape"],
            row=row["workload"],
            measured=f"{row['measured']:.2f} {row['unit']}",
            floor=f"{row['floor']:.2f} {row['unit']}",
            share=f"{row['share']:.1%}",
            rate="" if rate is None else f"{rate:,.0f} tok/s",
        ),
        flush=True,
    )


def rows_of(shape: str, folder: Path, flags: list[str], deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of one shape, as bench_gpu.Session gives them."""
    vocabulary = SHAPES[shape]["vocab_size"]
    options = argparse.Namespace(procs=4, token_ids=f"300:{min(40000, vocabulary - 2)}", traces=None)
    session = Session(shape, ["--model_dir", str(write(folder / shape, SHAPES[shape])), *flags], options)
    try:
        for workload in ROWS:
            left = deadline - time.monotonic()
            options.row_seconds = options.start_seconds = min(LIMIT, left)
            if left > 0:
                yield session.row(workload)
            else:
                yield {"shape": shape, "workload": workload, "error": "no time left (--seconds)"}
    finally:
        session.close()


def main() -> int:
    argv, flags = divided(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=DEFAULT, help=f"({' '.join(DEFAULT)})")
    parser.add_argument("--seconds", type=float, default=540, help="nothing runs for longer than that (540)")
    parser.add_argument("--save", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    flags = [*BASELINES["flags"], *flags]
    best = ceilings()
    found: dict[str, Any] = {"machine": machine(), "flags": flags, "ceilings": best._asdict(), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print(
        f"copy {best.copy / 1e12:.2f} TB/s, bf16 product {best.matmul / 1e12:.0f} TFLOP/s,"
        f" torch and a CUDA context {best.bare:.1f} s"
    )
    print(LINE.format(shape="shape", row="row", measured="measured", floor="floor", share="share", rate="output"))
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            spec = describe(SHAPES[shape])[0]
            for row in rows_of(shape, Path(folder), flags, deadline):
                found["rows"].append(beside_floor(row, spec, best))
                show(found["rows"][-1])
                if args.save:
                    args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
