"""Root-mean-square norms in the library's own function; the contract is ref/rms_norm.py."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., h], weight [h] -> x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""
    return torch.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [n, h], weight [h] -> (rms_norm(x + residual), x + residual), both in x's dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total
