"""Root-mean-square norm of each row (Zhang and Sennrich, 2019), alone and fused with the residual addition."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., h], weight [h] -> x / sqrt(mean(x^2) + eps) * weight, in x's dtype; computed in fp32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [n, h], weight [h] -> (rms_norm(x + residual), x + residual), both in x's dtype.

    The sum is rounded to x's dtype once and the norm is that of the rounded sum.
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total
