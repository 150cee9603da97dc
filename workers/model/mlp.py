"""The feed-forward layer of a block."""

import torch

from aiollm.kernels.ops import Ops
from aiollm.kernels.ref.gated import ACTIVATIONS
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weights
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import TensorParallel


class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))): this rank's columns of the inner layer."""

    def __init__(self, spec: DecoderSpec, weights: Weights, at: str, ops: Ops, tp: TensorParallel) -> None:
        inner = at + ("gate_up" if spec.gated else "up")
        self._inner = weights[inner]
        self._inner_bias = weights.get(inner + "_bias")
        self._gated = spec.activation if spec.gated else None
        self._activation = ACTIVATIONS[spec.activation]
        self._down = weights[at + "down"]
        self._down_bias = weights.get(at + "down_bias") if tp.rank == 0 else None  # added once to the sum
        self._ops = ops

    def __call__(self, x: torch.Tensor, before: Norm | None, residual: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, hidden] -> this rank's part of residual + mlp(norm(x)), which then lies in the residual's memory.

        The parts of the ranks add up to the result.
        """
        ops = self._ops
        if self._gated:
            inner = ops.gated_linear(x, self._inner, self._inner_bias, self._gated, before)
        else:
            inner = self._activation(ops.linear(x, self._inner, self._inner_bias, before))
        return ops.linear(inner, self._down, self._down_bias, residual=residual)
