"""The attention layer of a block."""

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.kernels.variants import Norm, Rotary, Scoring
from aiollm.kernels.weight import Weights
from aiollm.workers.model.head_norms import HeadNorms
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel


class Attention:
    """Grouped-query attention over the KV pool: this rank's heads."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        at: str,
        rotary: Rotary,
        window: int,
        ops: Ops,
        tp: TensorParallel,
    ) -> None:
        shard = Shard(spec, tp.rank, tp.size)
        self._heads = [shard.heads, shard.kv_heads, shard.kv_heads]
        self._width = spec.head_dim
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self._qkv = weights[at + "qkv"]
        self._qkv_bias = weights.get(at + "qkv_bias")
        slopes = None
        if spec.alibi:
            slopes = alibi_slopes(spec.heads).narrow(0, shard.first_head, shard.heads).to(rotary.cos_sin.device)
        self._scoring = Scoring(scale, window, spec.attention_softcap, slopes)
        self._norms = HeadNorms(spec, weights, at, ops, tp)
        self._o = weights[at + "o"]
        self._o_bias = weights.get(at + "o_bias") if tp.rank == 0 else None  # added once to the sum
        self._rotary = rotary
        self._ops = ops

    def __call__(
        self,
        x: torch.Tensor,
        before: Norm | None,
        residual: torch.Tensor | None,
        batch: Batch,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
    ) -> torch.Tensor:
        """x [tokens, hidden] -> this rank's part of residual + attention(norm(x)), then in the residual's memory.

        The parts of the ranks add up to the result. Pools [slots + 1, local KV heads, head_dim] are written in place.
        """
        ops = self._ops
        qkv = ops.linear(x, self._qkv, self._qkv_bias, before).view(len(x), -1, self._width)
        q, k, v = qkv.split_with_sizes(self._heads, dim=1)
        q, k, q_norm, k_norm = self._norms(q, k)
        q = ops.rotary_store(q, k, v, q_norm, k_norm, self._rotary, batch.positions, k_pool, v_pool, batch.slots)
        attended = ops.attention(q, k_pool, v_pool, batch, self._scoring)
        return ops.linear(attended.flatten(1), self._o, self._o_bias, residual=residual)


def alibi_slopes(heads: int) -> torch.Tensor:
    """How fast each head's scores fall with distance: [heads] float32 (Press et al., 2022, section 3 and its code).

    For a power of two a geometric sequence that ends at 2^-8; otherwise that of the next lower one, and every second
    value of that of the next higher one behind it.
    """
    lower = 1 << (heads.bit_length() - 1)
    exponents = [8 / lower * (i + 1) for i in range(lower)] + [4 / lower * (2 * i + 1) for i in range(heads - lower)]
    return torch.exp2(-torch.tensor(exponents))
