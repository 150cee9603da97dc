"""The first layer of a gated feed-forward network: norm, gate and up projections, activation."""

import torch

from aiollm.kernels.ref.gated import gated
from aiollm.kernels.ref.linear import linear
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Weight


def gated_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str, before: Norm | None = None
) -> torch.Tensor:
    """x [n, in], weight [2i, in] with the gate in the first half -> gated(linear(x, ...), activation) [n, i].

    An implementation may keep the product in fp32 or round it to x's dtype.
    """
    return gated(linear(x, weight, bias, before), activation)
