"""Norms of queries and keys, between their projection and their rotation."""

import torch

from aiollm.kernels.ops import Ops
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weights
from aiollm.workers.model.norms import norm_of
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel


class HeadNorms:
    """Apply what rotary_store cannot, and hand on what it can."""

    def __init__(self, spec: DecoderSpec, weights: Weights, at: str, ops: Ops, tp: TensorParallel) -> None:
        self._kind = spec.qk_norm
        self._ops = ops
        self._tp = tp
        if self._kind:
            self._q, self._k = norm_of(spec, weights, at + "q_norm"), norm_of(spec, weights, at + "k_norm")
        if self._kind == "heads":
            self._plain = self._q._replace(weight=torch.ones_like(self._q.weight[0]))
        kv_heads = Shard(spec, tp.rank, tp.size).kv_heads * tp.size  # counts a head on two ranks twice
        self._widths = spec.heads * spec.head_dim, kv_heads * spec.head_dim

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Norm | None, Norm | None]:
        """q [n, hq, d], k [n, hkv, d] -> both, and the norms of each head that are left to rotary_store."""
        norm = self._ops.norm
        if self._kind is None:
            return q, k, None, None
        if self._kind == "head":
            return q, k, self._q, self._k
        if self._kind == "heads":
            return norm(q, self._plain).mul_(self._q.weight), norm(k, self._plain).mul_(self._k.weight), None, None
        if self._tp.size == 1:
            return norm(q.flatten(1), self._q).view(q.shape), norm(k.flatten(1), self._k).view(k.shape), None, None
        means = [x.float().square().sum((1, 2)) / width for x, width in zip((q, k), self._widths, strict=True)]
        of_q, of_k = self._tp.all_reduce(torch.stack(means))
        return _scaled(q, of_q, self._q), _scaled(k, of_k, self._k), None, None


def _scaled(x: torch.Tensor, mean: torch.Tensor, by: Norm) -> torch.Tensor:
    """x [n, h, d] and the mean of squares [n] of all ranks' heads -> their norm; fp32 inside."""
    scale = torch.rsqrt(mean + by.eps)[:, None, None]
    return (x.float() * scale * by.weight.float().view(x.shape[1:])).to(x.dtype)
