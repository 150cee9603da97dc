"""A dense layer."""

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, in], weight [out, in], bias [out] or None -> x @ weight.T + bias [n, out] in x's dtype; fp32 inside."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
