"""THE decoder: one forward for every family, over any table of operations."""

from collections.abc import Sequence

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.kernels.weight import Weights
from aiollm.workers.model.attention import Attention
from aiollm.workers.model.mlp import Mlp
from aiollm.workers.model.rotary import cos_sin_table
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel


class Decoder:
    """A stack of blocks between an embedding and an output layer. Holds weights, and no state of any request."""

    def __init__(self, spec: DecoderSpec, weights: Weights, ops: Ops, tp: TensorParallel) -> None:
        """`weights` are those of `workers.weights.load` or `dummy` for the same spec and rank."""
        self.spec = spec
        self.shard = Shard(spec, tp.rank, tp.size)
        self._ops = ops
        self._tp = tp
        self._embedding = weights["embedding"]
        self._head = weights["head"]
        cos_sin = cos_sin_table(spec.rope, spec.max_position, self._embedding.device)
        names = [f"layers.{i}." for i in range(spec.layers)]
        self._first_norm = weights["layers.0.attention_norm"]
        self._blocks = [
            (
                Attention(spec, weights, at, cos_sin, ops, tp),
                weights[at + "mlp_norm"],
                Mlp(spec, weights, at, ops, tp),
                weights[following],  # the norm that this block's output enters next
            )
            for at, following in zip(names, [*(at + "attention_norm" for at in names[1:]), "norm"], strict=True)
        ]

    def forward(self, ids: torch.Tensor, batch: Batch, kv: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """ids [tokens] int64 -> [tokens, hidden], after the final norm.

        `kv` holds the pools (K, V) of each layer, [slots + 1, shard.kv_heads, head_dim]: written at `batch.slots`,
        read through `batch.slot_table`.
        """
        ops, eps = self._ops, self.spec.norm_eps
        batch = ops.plan(batch, self.shard.kv_heads)
        residual = ops.embedding(ids, self._embedding)
        x = ops.rms_norm(residual, self._first_norm, eps)
        for (attention, mlp_norm, mlp, next_norm), (k_pool, v_pool) in zip(self._blocks, kv, strict=True):
            x, residual = ops.add_rms_norm(attention(x, batch, k_pool, v_pool), residual, mlp_norm, eps)
            x, residual = ops.add_rms_norm(mlp(x), residual, next_norm, eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, hidden] -> [r, vocab] float32, on every rank."""
        shard = self._ops.linear(hidden, self._head, None)
        return self._tp.gather_vocab(shard)[:, : self.spec.vocab].float()
