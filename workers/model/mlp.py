"""The feed-forward layer of a block."""

import torch

from aiollm.kernels.ops import Ops
from aiollm.kernels.weight import Weights
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import TensorParallel


class Mlp:
    """SwiGLU: down(silu(gate(x)) * up(x)); this rank's columns of gate and up."""

    def __init__(self, spec: DecoderSpec, weights: Weights, at: str, ops: Ops, tp: TensorParallel) -> None:
        self._gate_up = weights[at + "gate_up"]
        self._gate_up_bias = weights[at + "gate_up_bias"] if spec.mlp_bias else None
        self._down = weights[at + "down"]
        self._down_bias = weights[at + "down_bias"] if spec.mlp_bias and tp.rank == 0 else None  # added once to the sum
        self._ops = ops
        self._tp = tp

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        ops = self._ops
        inner = ops.silu_mul(ops.linear(x, self._gate_up, self._gate_up_bias))
        return self._tp.all_reduce(ops.linear(inner, self._down, self._down_bias))
