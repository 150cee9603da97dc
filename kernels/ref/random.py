"""The random numbers of sampling: one per (seed, position), whatever else is in the batch."""

import torch

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 / golden ratio, as a signed integer


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """seeds, positions [r] int64 -> [r] float64 in [0, 1): mix(mix(seed + G) + (position + 1) * G) >> 11, over 2**53.

    `mix` is the finalizer of splitmix64 (Steele, Lea and Flood, 2014) and G its increment, all modulo 2**64. The seed
    is mixed first so that neighbouring seeds do not give the same stream shifted by a few positions.
    """
    return _shift(_mix(_mix(seeds + GOLDEN) + (positions + 1) * GOLDEN), 11).double() * 2.0**-53


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
