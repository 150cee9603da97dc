import cmath

import pytest
import torch

from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.ref.rms_norm import rms_norm
from aiollm.kernels.tolerance import TOLERANCE, assert_close

HQ, HKV, WIDTH, ROT = 4, 2, 12, 8


def angles() -> torch.Tensor:
    """[position, ROT / 2]."""
    return torch.arange(50)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate by products of complex numbers: the pair (i, i + ROT / 2) is one number."""
    y = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for i, angle in enumerate(angles()[position].tolist()):
            for head in range(x.shape[1]):
                number = complex(y[token, head, i], y[token, head, i + ROT // 2]) * cmath.exp(1j * angle)
                y[token, head, i], y[token, head, i + ROT // 2] = number.real, number.imag
    return y.to(x.dtype)


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_rotates_and_stores(ops: Ops, n: int, normed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, HQ + 2 * HKV, WIDTH, generator=generator).to(dtype)
    q, k, v = qkv.split([HQ, HKV, HKV], dim=1)  # views
    weights = torch.randn(2, WIDTH, generator=generator).to(dtype)
    q_weight, k_weight = weights if normed else (None, None)
    cos_sin = torch.cat([angles().cos(), angles().sin()], dim=1)
    positions = torch.arange(n) * 5 % 50
    slots = torch.randperm(30, generator=generator)[:n]
    k_pool, v_pool = torch.full((2, 31, HKV, WIDTH), 7.0).to(dtype)
    rotated = ops.rotary_store(q, k, v, q_weight, k_weight, 1e-6, cos_sin, positions, k_pool, v_pool, slots)
    if normed:
        q, k = rms_norm(q, weights[0], 1e-6), rms_norm(k, weights[1], 1e-6)
    assert_close(rotated, turned(q, positions))
    assert_close(k_pool[slots], turned(k, positions))
    assert torch.equal(v_pool[slots], v)
    others = torch.ones(31, dtype=torch.bool).index_fill(0, slots, False)
    assert bool((k_pool[others] == 7).all()) and bool((v_pool[others] == 7).all())
