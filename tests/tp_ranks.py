"""What the tests of tensor parallelism run in the process of each rank: a module that a fresh process can import."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aiollm.kernels.cases import make_batch
from aiollm.kernels.ops import cpu_ops
from aiollm.workers.families.registry import describe
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.tp import TensorParallel
from aiollm.workers.weights import load

CPU = torch.device("cpu")


def run_rank(work: Callable[..., Any], rank: int, size: int, folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    tp = TensorParallel.join(rank, size, folder / "rendezvous", CPU, timeout_seconds=60)
    torch.save(work(tp, *arguments), folder / f"{rank}.pt")
    tp.close()


def logits_of(tp: TensorParallel, checkpoint: Path, dtype: torch.dtype, quantized: bool = False) -> torch.Tensor:
    """Logits of a whole prompt beside another sequence's, on this rank; `quantized` takes 8-bit weights."""
    description = describe(json.loads((checkpoint / "config.json").read_text()))
    spec = description.spec
    ops = cpu_ops()
    quantize = ops.quantize if quantized else None
    weights = load(checkpoint, spec, description.names, dtype=dtype, device=CPU, tp=tp, quantize=quantize)
    decoder = Decoder(spec, weights, ops, tp)
    batch = make_batch([(0, 23), (0, 1)], slots=64, max_length=32)
    shape = (65, decoder.shard.kv_heads, spec.head_dim)
    kv = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(spec.layers)]
    ids = torch.arange(24) * 5 % spec.vocab
    return decoder.logits(decoder.forward(ids, batch, kv))


def collectives(tp: TensorParallel) -> dict[str, torch.Tensor]:
    mine = float(tp.rank + 1)
    return {
        "sum": tp.all_reduce(torch.full((3,), mine)),
        "half": tp.all_reduce(torch.full((3,), mine, dtype=torch.bfloat16)),
        "gathered": tp.gather_vocab(torch.full((2, 3), mine)),
        "ids": tp.broadcast(torch.tensor([7, 8]) * tp.rank, src=1),
    }
