"""Causal attention of each sequence's new tokens over its cached and new tokens."""

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.variants import Scoring


def attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scoring: Scoring
) -> torch.Tensor:
    """q [tokens, hq, d]; k_pool, v_pool [slots + 1, hkv, d] -> [tokens, hq, d] in q's dtype; fp32 inside.

    Sequence s owns the packed tokens starts[s] to starts[s + 1]; its keys and values lie in the slots
    slot_table[rows[s], :lengths[s]], in order of position, the new tokens' already stored. Query head i reads KV head
    i // (hq / hkv). Entries of the slot table at and past the length are never read.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k_pool.shape[1]
    starts = batch.starts.tolist()
    for i, (row, length) in enumerate(zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True)):
        begin, end = starts[i], starts[i + 1]
        slots = batch.slot_table[row, :length].long()
        keys = k_pool[slots].float().repeat_interleave(group, dim=1)  # [length, hq, d]
        values = v_pool[slots].float().repeat_interleave(group, dim=1)
        position = torch.arange(length - (end - begin), length, device=q.device)
        distance = position[:, None] - torch.arange(length, device=q.device)  # [new, length]; future keys: negative
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scoring.scale
        weights = weigh(scores, distance, scoring)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def weigh(scores: torch.Tensor, distance: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """The softmax over keys of scores [..., hq, new, length]; `distance` broadcasts to them.

    A distance is a query's position less a key's; a key at a negative one lies in the future and weighs nothing.
    """
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores = scores - scoring.slopes.float()[:, None, None] * distance
    hidden = distance < 0
    if scoring.window:
        hidden = hidden | (distance >= scoring.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is None:
        return scores.softmax(-1)
    sink = scoring.sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
