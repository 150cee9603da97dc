"""THE decoder: one forward for every family, over any table of operations."""

from collections.abc import Sequence

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.kernels.variants import Rotary
from aiollm.kernels.weight import Weights
from aiollm.workers.model.block import Block
from aiollm.workers.model.norms import norm_of
from aiollm.workers.model.reward import Reward
from aiollm.workers.model.rotary import Rope, cos_sin_table
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel


class Decoder:
    """A stack of blocks between an embedding and an output layer. Holds weights, and no state of any request."""

    def __init__(
        self, spec: DecoderSpec, weights: Weights, ops: Ops, tp: TensorParallel, groups: Sequence[int] = ()
    ) -> None:
        """`weights` are those of `workers.weights.load` or `dummy` for the same spec and rank. `groups` tells which
        slots of a batch each layer has; without it all have the first."""
        self.spec = spec
        self.shard = Shard(spec, tp.rank, tp.size)
        self._ops = ops
        self._tp = tp
        self._embedding = weights["embedding"]
        # Rounded as the embeddings are: it is with that factor that models are trained.
        self._scale = float(torch.tensor(spec.embedding_scale, dtype=self._embedding.dtype))
        self._positions = weights["positions"] if spec.learned_positions else None
        self._embedding_norm = norm_of(spec, weights, "embedding_norm") if spec.embedding_norm else None
        self._norm = norm_of(spec, weights, "norm", spec.logit_scale)
        self._reward = Reward(spec, weights, self._norm, ops) if spec.reward else None
        self._head = None if spec.reward else weights["head"]
        reaches = [spec.reach(i) for i in range(spec.layers)]
        tables = {rope: self._rotary(rope) for rope in {rope for rope, _ in reaches}}
        self._blocks = [
            Block(spec, weights, f"layers.{i}.", tables[rope], window, ops, tp)
            for i, (rope, window) in enumerate(reaches)
        ]
        self._groups = groups or [0] * spec.layers

    def _rotary(self, rope: Rope | None) -> Rotary:
        table = cos_sin_table(rope, self.spec.max_position, self._embedding.device)
        return Rotary(table, rope is not None and rope.interleaved)

    def forward(self, ids: torch.Tensor, batch: Batch, kv: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """ids [tokens] int64 -> [tokens, hidden], before the final norm.

        `kv` holds the pools (K, V) of each layer, [slots + 1, shard.kv_heads, head_dim]: written at the slots of its
        group in the batch, and read through that group's slot table.
        """
        batches, plan = [self._ops.plan(batch, self.shard.kv_heads)], None
        for other in batch.windowed:
            batches.append(self._ops.plan(other._replace(plan=plan), self.shard.kv_heads))
            plan = batches[-1].plan
        x = self._embedded(ids, batch)
        for block, group, pools in zip(self._blocks, self._groups, kv, strict=True):
            x = block.forward(x, batches[group], pools)
        return x

    def _embedded(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        x = self._ops.embedding(ids, self._embedding)
        if self._scale != 1:
            x = x.mul_(self._scale)
        if self._positions is not None:
            x = x.add_(self._ops.embedding(batch.positions, self._positions))
        return x if self._embedding_norm is None else self._ops.norm(x, self._embedding_norm)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, hidden] -> the same behind the final norm, times the scale that some models give their logits."""
        return self._ops.norm(hidden, self._norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, hidden] -> [r, vocab] in hidden's dtype, on every rank; of a reward model the scores, [r, 1]."""
        if self._reward is not None:
            return self._reward(hidden)
        shard = self._ops.linear(hidden, self._head, before=self._norm)
        logits = self._tp.gather_vocab(shard)[:, : self.spec.vocab]
        if cap := self.spec.logit_softcap:
            logits = logits.div_(cap).tanh_().mul_(cap)
        return logits
