"""Perplexity of the demo model on this repository's own text, with each kind of weights on this machine.

    python tools/perplexity.py [--model_dir MODEL]

Windows of 512 tokens of LICENSE and README.md, each computed alone; every token but a window's first counts.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from aiollm.hub.resolve import resolve
from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import cpu_ops
from aiollm.text.tokenizer import Tokenizer
from aiollm.workers import kv, weights
from aiollm.workers.families.registry import describe
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.tp import Shard, TensorParallel

CPU = torch.device("cpu")
WINDOW = 512  # tokens
TEXTS = ("LICENSE", "README.md")


def perplexities(folder: Path) -> dict[str, float]:
    """Of fp32 and of int8 weights."""
    tokenizer = Tokenizer.load(str(folder))
    texts = [(Path(__file__).parent.parent / name).read_text(encoding="utf-8") for name in TEXTS]
    encoded = [torch.tensor(tokenizer.encode(text, False)) for text in texts]
    windows = [window for ids in encoded for window in ids.split(WINDOW) if len(window) > 1]
    return {name: _perplexity(folder, windows, name == "int8") for name in ("fp32", "int8")}


@torch.inference_mode()
def _perplexity(folder: Path, windows: list[torch.Tensor], quantized: bool) -> float:
    ops, tp = cpu_ops(), TensorParallel()
    spec, names, _ = describe(json.loads((folder / "config.json").read_bytes()))
    quantize = ops.quantize if quantized else None
    parameters = weights.load(folder, spec, names, dtype=torch.float32, device=CPU, tp=tp, quantize=quantize)
    decoder = Decoder(spec, parameters, ops, tp)
    pools = kv.allocate(WINDOW, spec, Shard(spec, 0, 1), torch.float32, CPU)
    total, count = 0.0, 0
    for ids in windows:
        n = len(ids)
        positions = torch.arange(n)
        batch = Batch(
            rows=torch.zeros(1, dtype=torch.int64),
            starts=torch.tensor([0, n], dtype=torch.int32),
            lengths=torch.tensor([n], dtype=torch.int32),
            positions=positions,
            slots=positions,
            slot_table=positions[None].int(),
            max_new=n,
            max_length=n,
        )
        logits = decoder.logits(decoder.forward(ids, batch, pools)[:-1])
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += n - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of fp32 and int8 weights on the repository's own text")
    parser.add_argument("--model_dir", help="Hugging Face folder, hub id or .gguf file; the demo model without it")
    args = parser.parse_args()
    found = perplexities(Path(resolve(args.model_dir, progress=lambda phase, fraction: None).folder))
    for name, value in found.items():
        print(f"{name}  {value:.4f}  {value / found['fp32'] - 1:+.2%}")


if __name__ == "__main__":
    main()
