"""The random numbers of sampling, on a GPU; the contract is ref/random.py, and these are the same to the last bit."""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def bits(seed, position):
    """int64 seed and position -> uint64, of which the upper 53 bits over 2**53 are the uniform number."""
    seed = seed.to(tl.uint64, bitcast=True)
    return (_mix(_mix(seed + _GOLDEN) + (position.to(tl.uint64) + 1) * _GOLDEN) >> 11) << 11
