"""What tells one model's norm, rotation or attention from another's: plain values that the ops take as arguments."""

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """y = (x - centre) / sqrt(mean((x - centre)^2) + eps) * weight + bias; RMS norm where the centre is 0."""

    weight: torch.Tensor  # [h], any dtype; where a model multiplies by 1 + w, this holds 1 + w in float32
    eps: float
    bias: torch.Tensor | None = None  # [h]
    centered: bool = False  # layer norm: the centre is the row's mean


class Rotary(NamedTuple):
    """Rotary position embedding (Su et al., 2021) of the leading rot dimensions of each head."""

    cos_sin: torch.Tensor  # [max_position, rot] float32: cosines in the first half of the columns, then sines
    interleaved: bool = False  # dimension 2i is paired with 2i + 1; otherwise i is with i + rot / 2


class Scoring(NamedTuple):
    """How attention weighs the keys that a query sees."""

    scale: float
    window: int = 0  # how many positions a query sees, its own included; 0 is all before it
    softcap: float = 0.0  # scores become cap * tanh(score / cap); 0 is off
    slopes: torch.Tensor | None = None  # [hq] float32: ALiBi (Press et al., 2022) adds -slope * distance to a score
    sinks: torch.Tensor | None = None  # [hq] float32: the score of one more key, which has no value
