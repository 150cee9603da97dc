"""From a dense weight to 8-bit integers."""

import torch

from aiollm.kernels.weight import Int8Weight


def quantize(weight: torch.Tensor) -> Int8Weight:
    """weight [out, in] -> integers and one scale for each row, so that a row's largest magnitude becomes 127."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    values = weight / scales.where(scales > 0, 1.0)[:, None]
    return Int8Weight(values.round().to(torch.int8), scales)
