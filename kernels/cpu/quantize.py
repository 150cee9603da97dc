"""8-bit weights in the layout of the processor's dot products; the contract is ref/quantize.py."""

import torch

from aiollm.kernels.ref.quantize import quantize as reference
from aiollm.kernels.weight import Int8Weight


def quantize(weight: torch.Tensor) -> Int8Weight:
    """weight [out, in] -> the reference's integers, reordered by oneDNN; RuntimeError where the CPU is not `exact`."""
    if not exact():
        raise RuntimeError("8-bit weights need a CPU with AVX-512 VNNI")
    values, scales = reference(weight)
    return Int8Weight(torch.ops.onednn.qlinear_prepack(values, None), scales)


def exact() -> bool:
    """Whether this CPU sums products of 8-bit integers without saturating: AVX2 alone stops at 16 bits."""
    return torch._C._has_mkldnn and torch.cpu._is_vnni_supported()
