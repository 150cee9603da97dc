"""Time for each token with 1, 32 and 256 rows that follow a grammar, beside rows that are free.

    python tools/bench_constrained.py [--shape qwen3-8b] [--tokenizer FOLDER] [--save FILE] [-- FLAGS]

Starts `aiollm serve` with dummy weights, FLAGS behind the others, and asks for completions of some rows at once, each
wave twice: the first one compiles and warms up. The grammar is a JSON schema of records without end, with short
strings, numbers and a choice of words, so that masks change with each token. Masks depend on the tokenizer:
--tokenizer takes tokenizer.json and tokenizer_config.json of a model with as many ids as the shape, instead of invented
words. Rows of a mixed wave share each step: what the constrained ones cost, the free ones pay too.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_gpu import divided, machine
from serving import Server
from shapes import SHAPES, write
from tokenizers import Tokenizer

RECORDS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["person", "company", "place"]},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "score", "tags"],
        "additionalProperties": False,
    },
}
CONSTRAINED = {"response_format": {"type": "json_schema", "json_schema": {"name": "records", "schema": RECORDS}}}
WAVES = ((1, 0), (0, 1), (32, 0), (0, 32), (256, 0), (0, 256), (255, 1), (224, 32))
"""Rows at once: free ones and constrained ones."""
KINDS = ("free", "constrained")
FIGURES = ("mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "median_ttft_ms", "total_output_tokens")
LINE = "{:>6}{:>13}{:>14}{:>14}{:>12}{:>14}{:>10}"


def take_tokenizer(source: Path, model: Path) -> None:
    """Give a model's folder the tokenizer of another one, and its end of sequence."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, model / name)
    end = json.loads((source / "tokenizer_config.json").read_text())["eos_token"]
    config = json.loads((model / "config.json").read_text())
    config["eos_token_id"] = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id(end)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")


def begin(server: Server, rows: int, options: argparse.Namespace, extra: dict[str, Any], result: Path) -> Any:
    """A load of this many requests at once, in processes of their own."""
    command = [
        sys.executable, "-P", "-m", "aiollm", "bench", "serve", "--base-url", server.url, "--num-prompts", str(rows),
        "--max-concurrency", str(rows), "--random-input-len", "64", "--random-output-len", str(options.tokens),
        "--procs", str(min(options.procs, rows)), "--metric-percentiles", "50,99", "--token-ids", options.token_ids,
        "--extra-body", json.dumps(extra), "--no-ignore-eos" if extra else "--ignore-eos",
        "--result-filename", str(result),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wave(server: Server, counts: tuple[int, int], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of free and of constrained rows that run together. Raises RuntimeError where a request fails."""
    with tempfile.TemporaryDirectory() as folder:
        loads = {
            kind: (begin(server, rows, options, extra, Path(folder, kind)), Path(folder, kind))
            for kind, rows, extra in zip(KINDS, counts, ({}, CONSTRAINED), strict=True)
            if rows
        }
        found = {}
        for kind, (process, result) in loads.items():
            _, said = process.communicate(timeout=options.seconds)
            if process.returncode:
                raise RuntimeError(f"bench serve ended with {process.returncode}: {said.strip()[-1000:]}")
            figures = json.loads(result.read_text())
            if figures["failed"]:
                raise RuntimeError(f"{figures['failed']} requests failed: {said.strip()[-1000:]}")
            found[kind] = {name: figures[name] for name in FIGURES}
    return found


def show(counts: tuple[int, int], found: dict[str, dict[str, Any]], plain: dict[int, float]) -> None:
    """A line for each kind of rows; the ratio is to as many rows that are all free."""
    free, constrained = counts
    for kind, figures in found.items():
        mean = figures["mean_tpot_ms"]
        ratio = f"{mean / plain[free + constrained]:.3f}" if free + constrained in plain else "-"
        cells = (mean, figures["p99_tpot_ms"], figures["p99_itl_ms"])
        print(LINE.format(free, constrained, kind, *(f"{value:.2f}" for value in cells), ratio), flush=True)


def main() -> int:
    argv, flags = divided(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="qwen3-8b", help="(qwen3-8b)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="has tokenizer.json of as many ids")
    parser.add_argument("--rows", type=int, default=256, help="waves of at most so many rows (256)")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer (256)")
    parser.add_argument("--procs", type=int, default=4, help="client processes of each kind (4)")
    parser.add_argument("--token-ids", default="300:40000", help="of prompts, LOW:HIGH (300:40000)")
    parser.add_argument("--seconds", type=float, default=300, help="limit of one wave (300)")
    parser.add_argument("--save", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"machine": machine(), "shape": args.shape, "flags": flags, "waves": []}
    found["tokenizer"] = "of a model" if args.tokenizer else "invented words"
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder, args.shape), SHAPES[args.shape])
        if args.tokenizer:
            take_tokenizer(args.tokenizer, model)
        print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
        print(
            LINE.format("free", "constrained", "figures of", "mean TPOT ms", "p99", "p99 gap ms", "ratio"), flush=True
        )
        plain: dict[int, float] = {}
        with Server("--model_dir", str(model), "--load_format", "dummy", *flags) as server:
            for counts in (counts for counts in WAVES if sum(counts) <= args.rows):
                wave(server, counts, args)
                figures = wave(server, counts, args)
                show(counts, figures, plain)
                if not counts[1]:
                    plain[counts[0]] = figures["free"]["mean_tpot_ms"]
                found["waves"].append({"free": counts[0], "constrained": counts[1], "figures": figures})
                if args.save:
                    args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
