"""The gated activation of a feed-forward layer (Shazeer, 2020)."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate_up [n, 2i], gate in the first half -> activation(gate) * up, [n, i] in the input's dtype; fp32 inside.

    `activation` is a key of ACTIVATIONS: silu, gelu (by the error function) or gelu_tanh (its usual approximation).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)
