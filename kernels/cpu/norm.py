"""Norms in the library's own functions; the contract is ref/norm.py."""

import torch

from aiollm.kernels.ref.norm import norm as reference
from aiollm.kernels.variants import Norm


def norm(x: torch.Tensor, by: Norm) -> torch.Tensor:
    """x [..., h] -> [..., h] in x's dtype. The library takes weights of that dtype, and no bias without a centre."""
    weight, eps, bias, centered = by
    if weight.dtype == x.dtype:
        if centered:
            return torch.layer_norm(x, weight.shape, weight, bias, eps)
        if bias is None:
            return torch.rms_norm(x, weight.shape, weight, eps)
    return reference(x, by)
