"""The attention layer of a block."""

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.kernels.weight import Weights
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel


class Attention:
    """Grouped-query attention over the KV pool; this rank's heads."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        at: str,
        cos_sin: torch.Tensor,
        ops: Ops,
        tp: TensorParallel,
    ) -> None:
        shard = Shard(spec, tp.rank, tp.size)
        self._heads = [shard.heads, shard.kv_heads, shard.kv_heads]
        self._width = spec.head_dim
        self._eps = spec.norm_eps
        self._scale = spec.head_dim**-0.5
        self._qkv = weights[at + "qkv"]
        self._qkv_bias = weights[at + "qkv_bias"] if spec.qkv_bias else None
        self._q_norm = weights[at + "q_norm"] if spec.qk_norm else None
        self._k_norm = weights[at + "k_norm"] if spec.qk_norm else None
        self._o = weights[at + "o"]
        self._o_bias = weights[at + "o_bias"] if spec.o_bias and tp.rank == 0 else None  # added once to the sum
        self._cos_sin = cos_sin
        self._ops = ops
        self._tp = tp

    def __call__(self, x: torch.Tensor, batch: Batch, k_pool: torch.Tensor, v_pool: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden]; pools [slots + 1, local KV heads, head_dim], written in place -> [tokens, hidden]."""
        ops = self._ops
        qkv = ops.linear(x, self._qkv, self._qkv_bias).view(len(x), -1, self._width)
        q, k, v = qkv.split_with_sizes(self._heads, dim=1)
        q = ops.rotary_store(
            q, k, v, self._q_norm, self._k_norm, self._eps, self._cos_sin, batch.positions, k_pool, v_pool, batch.slots
        )
        attended = ops.attention(q, k_pool, v_pool, batch, self._scale)
        return self._tp.all_reduce(ops.linear(attended.flatten(1), self._o, self._o_bias))
