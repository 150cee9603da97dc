"""The value that a quantised weight is; it goes wherever a dense one goes in `Ops.linear`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Int8Weight(NamedTuple):
    """A weight [out, in] as 8-bit integers of -127 to 127, one scale for each row: weight[o] ~ values[o] * scales[o].

    `values` is [out, in] int8 where the reference made it; a faster table may hold the same integers in a layout of its
    own, which only its own `linear` reads.
    """

    values: torch.Tensor
    scales: torch.Tensor  # [out] float32


Weight = torch.Tensor | Int8Weight
Weights = Mapping[str, Any]  # by name: a Weight where `Ops.linear` reads it, a torch.Tensor elsewhere
