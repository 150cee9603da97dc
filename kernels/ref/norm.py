"""Norm of each row, alone and fused with the residual addition: RMS (Zhang and Sennrich, 2019) or layer norm."""

import torch

from aiollm.kernels.variants import Norm


def norm(x: torch.Tensor, by: Norm) -> torch.Tensor:
    """x [..., h] -> the formula of `Norm`, [..., h] in x's dtype; computed in fp32."""
    y = x.float()
    if by.centered:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + by.eps) * by.weight.float()
    if by.bias is not None:
        y = y + by.bias.float()
    return y.to(x.dtype)


def add_norm(x: torch.Tensor, residual: torch.Tensor, by: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [n, h] -> (norm(x + residual), x + residual), both in x's dtype.

    The sum is rounded to x's dtype once and the norm is that of the rounded sum.
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return norm(total, by), total
