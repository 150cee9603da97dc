"""Causal attention of each sequence's new tokens over its cached and new tokens."""

import torch

from aiollm.kernels.batch import Batch


def attention(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scale: float) -> torch.Tensor:
    """q [tokens, hq, d]; k_pool, v_pool [slots + 1, hkv, d] -> [tokens, hq, d] in q's dtype; fp32 inside.

    Sequence s owns the packed tokens starts[s] to starts[s + 1]; its keys and values lie in the slots
    slot_table[rows[s], :lengths[s]], in order of position, the new tokens' already stored. Query head i reads KV head
    i // (hq / hkv). Entries of the slot table at and past the length are never read.
    """
    out = torch.zeros_like(q)
    group = q.shape[1] // k_pool.shape[1]
    starts = batch.starts.tolist()
    for i, (row, length) in enumerate(zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True)):
        begin, end = starts[i], starts[i + 1]
        slots = batch.slot_table[row, :length].long()
        keys = k_pool[slots].float().repeat_interleave(group, dim=1)  # [length, hq, d]
        values = v_pool[slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        position = torch.arange(length - (end - begin), length, device=q.device)
        future = torch.arange(length, device=q.device) > position[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
