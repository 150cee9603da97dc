"""Dense layers in the library's own matrix products; the contracts are ref/linear.py and ref/gated_linear.py."""

import torch

from aiollm.kernels.cpu.norm import norm
from aiollm.kernels.ref.gated import gated
from aiollm.kernels.ref.linear import TINY
from aiollm.kernels.variants import Norm
from aiollm.kernels.weight import Int8Weight, Weight

_NO_ZERO_POINTS = torch.zeros(1, dtype=torch.int32)  # of the weights: they are symmetric


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    before: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [n, in], weight [out, in], all of one dtype -> [n, out]; the residual is overwritten."""
    if before is not None:
        x = norm(x, before)
    dense = torch.nn.functional.linear
    y = _int8_linear(x, weight, bias) if isinstance(weight, Int8Weight) else dense(x, weight, bias)
    return y if residual is None else residual.add_(y)


def gated_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str, before: Norm | None = None
) -> torch.Tensor:
    """x [n, in], weight [2i, in] -> [n, i]."""
    return gated(linear(x, weight, bias, before), activation)


def _int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN takes unsigned activations, shifted by 128, and one scale for all of them: each row's own comes after.

    The high and the low halves of the rows are rows of one product, whose time is that of reading the weights. All
    linear layers of the 135M demo model, one thread of a Zen 5, by rows of the product: 8 ms at 2, 17 ms at 32, 27 ms
    at 64; torch._int_mm, which packs no weights, 15, 25 and 33 ms; fp32 30 ms at one row.
    """
    n = len(x)
    peak = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)
    high = (x * peak.reciprocal().mul_(127)).add_(128.5)
    halves = torch.cat([high, high.frac().mul_(254).add_(1.5)]).to(torch.uint8)
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        halves, 1 / 127, 128, weight.values, weight.scales, _NO_ZERO_POINTS, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = torch.add(y[:n], y[n:], alpha=1 / 254).mul_(peak)
    return y if bias is None else y.add_(bias)
