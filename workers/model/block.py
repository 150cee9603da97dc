"""One block: attention and the feed-forward layer, each added to the residual stream, in the order of a spec."""

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.kernels.variants import Rotary
from aiollm.kernels.weight import Weights
from aiollm.workers.model.attention import Attention
from aiollm.workers.model.mlp import Mlp
from aiollm.workers.model.norms import norm_of
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import TensorParallel

Pools = tuple[torch.Tensor, torch.Tensor]


class Block:
    """`forward(x, batch, pools)` is one of the methods below, by the spec.

    x [tokens, hidden] -> [tokens, hidden], which may lie in x's memory. The pools (K, V) of this layer,
    [slots + 1, local KV heads, head_dim], are written in place.
    """

    def __init__(
        self, spec: DecoderSpec, weights: Weights, at: str, rotary: Rotary, window: int, ops: Ops, tp: TensorParallel
    ) -> None:
        self._attention = Attention(spec, weights, at, rotary, window, ops, tp)
        self._mlp = Mlp(spec, weights, at, ops, tp)
        self._attention_norm = norm_of(spec, weights, at + "attention_norm") if spec.pre_norm else None
        self._mlp_norm = norm_of(spec, weights, at + "mlp_norm") if spec.pre_norm and not spec.parallel else None
        self._ops = ops
        self._tp = tp
        self.forward = self._parallel if spec.parallel else self._sequential
        if spec.post_norm:
            self.forward = self._normed_behind
            self._attention_post_norm = norm_of(spec, weights, at + "attention_post_norm")
            self._mlp_post_norm = norm_of(spec, weights, at + "mlp_post_norm")

    def _sequential(self, x: torch.Tensor, batch: Batch, pools: Pools) -> torch.Tensor:
        x = self._tp.all_reduce(self._attention(x, self._attention_norm, self._own(x), batch, *pools))
        return self._tp.all_reduce(self._mlp(x, self._mlp_norm, self._own(x)))

    def _parallel(self, x: torch.Tensor, batch: Batch, pools: Pools) -> torch.Tensor:
        assert self._attention_norm is not None
        normed = self._ops.norm(x, self._attention_norm)
        attended = self._attention(normed, None, self._own(x), batch, *pools)
        return self._tp.all_reduce(self._mlp(normed, None, attended))

    def _normed_behind(self, x: torch.Tensor, batch: Batch, pools: Pools) -> torch.Tensor:
        y = self._tp.all_reduce(self._attention(x, self._attention_norm, None, batch, *pools))
        x = x.add_(self._ops.norm(y, self._attention_post_norm))
        y = self._tp.all_reduce(self._mlp(x, self._mlp_norm, None))
        return x.add_(self._ops.norm(y, self._mlp_post_norm))

    def _own(self, x: torch.Tensor) -> torch.Tensor | None:
        """The residual of this rank's sum: it is added once, as biases are."""
        return x if self._tp.rank == 0 else None
