"""A dense layer in the library's own matrix products; the contract is ref/linear.py."""

import torch

from aiollm.kernels.ref.linear import TINY
from aiollm.kernels.weight import Int8Weight, Weight

_NO_ZERO_POINTS = torch.zeros(1, dtype=torch.int32)  # of the weights: they are symmetric


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, in], weight [out, in], bias [out] or None, of one dtype -> [n, out]."""
    if isinstance(weight, Int8Weight):
        return _int8_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


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
