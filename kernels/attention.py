"""Attention of mixed steps: sequences that bring one token, and sequences that bring more, by a kernel each.

The former is bound by memory, the latter by arithmetic. Where prefill_hopper.py fits, they run side by side, on
multiprocessors that the plan shares out.
"""

from collections.abc import Iterator
from typing import Any

import torch

from aiollm.kernels import prefill_hopper as hopper
from aiollm.kernels.batch import Batch
from aiollm.kernels.decode_attention import decode_attention, lay_out
from aiollm.kernels.plan import plan
from aiollm.kernels.prefill_attention import prefill_attention
from aiollm.kernels.variants import Scoring
from aiollm.kernels.workload import Case, Shape


def attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scoring: Scoring
) -> torch.Tensor:
    """q [tokens, hq, d]; k_pool, v_pool [slots + 1, hkv, d] -> [tokens, hq, d]; the contract is ref/attention.py.

    Tokens past the last sequence's, which fill up a graph, get no result.
    """
    if batch.plan is None:
        batch = plan(batch, k_pool.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or len(batch.rows) == 0:
        return out
    beside = batch.max_new > 1 and hopper.fits(q, k_pool, v_pool)
    laid = lay_out(q, k_pool, batch, scoring, beside)
    if batch.max_new > 1:
        prefill_attention(q, k_pool, v_pool, batch, scoring, out, laid.plan.prompts if beside else None)
    decode_attention(q, k_pool, v_pool, batch, scoring, out, laid)
    return out


def cases(shape: Shape) -> Iterator[Case]:
    """Steps of one token for each sequence, slots scattered, laid out by an earlier layer; more tokens: see prefill."""
    hq, hkv, d = shape.heads, shape.kv_heads, shape.head_dim
    ragged = [int(32768 ** (i / 63)) for i in range(64)]
    for label, lengths in {
        "1 x 128": [128], "1 x 1k": [1024], "1 x 8k": [8192], "1 x 32k": [32768], "8 x 1k": [1024] * 8,
        "64 x 1k": [1024] * 64, "256 x 320": [320] * 256, "256 x 1k": [1024] * 256, "256 x 4k": [4096] * 256,
        "1024 x 192": [192] * 1024, "64 of 1 to 32k": ragged,
    }.items():  # fmt: skip

        def make(device: torch.device, lengths: list[int] = lengths) -> tuple[Any, ...]:
            n, total, longest = len(lengths), sum(lengths), max(lengths)
            q = torch.randn(n, hq, d, device=device, dtype=shape.dtype)
            k_pool, v_pool = torch.randn(2, total + 1, hkv, d, device=device, dtype=shape.dtype).unbind()
            ends = torch.tensor(lengths, device=device, dtype=torch.int32)
            begins = ends.cumsum(0) - ends
            places = (begins[:, None] + torch.arange(longest, device=device)).clamp(max=total - 1)
            table = torch.randperm(total, device=device, dtype=torch.int32)[places]
            rows = torch.arange(n, device=device)
            starts = torch.arange(n + 1, device=device, dtype=torch.int32)
            batch = plan(Batch(rows, starts, ends, ends.long() - 1, rows, table, 1, longest), hkv)
            by = Scoring(d**-0.5)
            if device.type == "cuda":
                attention(q, k_pool, v_pool, batch, by)
            return q, k_pool, v_pool, batch, by

        moved = (2 * sum(lengths) * hkv + 2 * len(lengths) * hq) * d * shape.dtype.itemsize
        yield Case("attention", label, make, bytes=moved, flops=4 * sum(lengths) * hq * d)
