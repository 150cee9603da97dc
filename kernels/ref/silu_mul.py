"""The gated activation of a SwiGLU layer (Shazeer, 2020)."""

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [n, 2i], gate in the first half -> silu(gate) * up [n, i] in the input's dtype; fp32 inside."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
