import math

import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.norm import add_norm as triton_add_norm
from aiollm.kernels.norm import norm as triton_norm
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.ref.norm import norm
from aiollm.kernels.tolerance import TOLERANCE, assert_close
from aiollm.kernels.variants import Norm

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("n", ROWS)
KINDS = ("rms", "unit_offset", "rms_bias", "layer", "layer_bias")


def make_norm(kind: str, width: int, dtype: torch.dtype, eps: float = 1e-5) -> Norm:
    weight, bias = normal(width, dtype=dtype, seed=1), normal(width, dtype=dtype, seed=2)
    if kind == "unit_offset":
        weight = 1 + weight.float()
    return Norm(weight, eps, bias if kind.endswith("bias") else None, centered=kind.startswith("layer"))


@ops_tables
@dtypes
@rows
@pytest.mark.parametrize("kind", KINDS)
def test_norm_is_the_formula_in_double_precision(ops: Ops, kind: str, n: int, dtype: torch.dtype) -> None:
    x, by = normal(n, 63, dtype=dtype) + 0.5, make_norm(kind, 63, dtype, eps=0.5)
    expected = torch.empty(n, 63, dtype=torch.float64)
    for i, row in enumerate(x.double().tolist()):
        centre = sum(row) / 63 if by.centered else 0.0
        spread = math.sqrt(sum((v - centre) ** 2 for v in row) / 63 + 0.5)
        expected[i] = (torch.tensor(row, dtype=torch.float64) - centre) / spread
    expected = expected * by.weight.double() + (0 if by.bias is None else by.bias.double())
    assert_close(ops.norm(x, by), expected.to(dtype))


@ops_tables
@dtypes
@rows
def test_add_norm_is_the_norm_of_the_rounded_sum(ops: Ops, n: int, dtype: torch.dtype) -> None:
    x, residual = normal(n, 100, dtype=dtype), normal(n, 100, dtype=dtype, seed=3)
    by = make_norm("rms", 100, dtype)
    normed, total = ops.add_norm(x, residual, by)
    assert torch.equal(total, x + residual)
    assert_close(normed, ops.norm(x + residual, by))


def moved(by: Norm, device: torch.device) -> Norm:
    return by._replace(weight=by.weight.to(device), bias=None if by.bias is None else by.bias.to(device))


SIZES = [("rms", n, width) for n, width in ((0, 8), (1, 8), (19, 100), (3, 576))] + [(kind, 5, 63) for kind in KINDS]


@dtypes
@pytest.mark.parametrize(("kind", "n", "width"), SIZES)
def test_triton_norms_as_the_reference(n: int, width: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = normal(n, width, dtype=dtype) + 0.5, normal(n, width, dtype=dtype, seed=3)
    by = make_norm(kind, width, dtype)
    assert_close(triton_norm(x.to(device), moved(by, device)).cpu(), norm(x, by))
    normed, total = triton_add_norm(x.to(device), residual.to(device), moved(by, device))
    assert_close(total.cpu(), x + residual)  # the interpreter rounds bfloat16 towards zero
    assert_close(normed.cpu(), norm(total.cpu(), by))


def test_triton_norm_takes_strided_rows_and_heads(device: torch.device) -> None:
    wide = normal(7, 4, 96)
    by = make_norm("rms", 24, torch.float32)
    for x in (wide[:, 0, 24:48], wide[:, 1:3, :24]):
        assert_close(triton_norm(x.to(device), moved(by, device)).cpu(), norm(x, by))
    x, residual = wide[:, 2, :24], wide[:, 3, 48:72]
    normed, _ = triton_add_norm(x.to(device), residual.to(device), moved(by, device))
    assert_close(normed.cpu(), norm(x + residual, by))


def test_triton_norm_says_what_it_cannot_take(device: torch.device) -> None:
    by = Norm(torch.ones(20000, device=device), 1e-6)
    with pytest.raises(ValueError, match="20000 elements"):
        triton_norm(torch.ones(1, 20000, device=device), by)
    with pytest.raises(ValueError, match="contiguous"):
        triton_norm(torch.ones(20, 20, device=device).T, Norm(torch.ones(20, device=device), 1e-6))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("kind", ["rms", "layer_bias"])
@pytest.mark.parametrize("width", [5120, 16384])
@pytest.mark.parametrize("n", [1, 63, 4096])
def test_triton_norms_large_rows(n: int, width: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, n, width, dtype=dtype, device=device)
    by = moved(make_norm(kind, width, dtype), device)
    normed, total = triton_add_norm(x, residual, by)
    assert torch.equal(total, x + residual)
    assert_close(normed, norm(total, by))
