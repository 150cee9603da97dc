"""The small dense operations: embedding, norms, linear, silu_mul."""

import math

import pytest
import torch

from aiollm.kernels.cases import ROWS
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.tolerance import TOLERANCE, assert_close

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("n", ROWS)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@ops_tables
@rows
def test_embedding_takes_the_rows(ops: Ops, n: int) -> None:
    table = normal(11, 6, dtype=torch.float32)
    ids = torch.arange(n) * 7 % 11
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[0], *(table[i] for i in ids)])[1:])


@ops_tables
@dtypes
@rows
def test_rms_norm_has_unit_mean_square_times_weight(ops: Ops, n: int, dtype: torch.dtype) -> None:
    x, weight = normal(n, 63, dtype=dtype), normal(63, dtype=dtype, seed=1)
    scale = [math.sqrt(sum(v * v for v in row) / 63 + 0.5) for row in x.double().tolist()]
    expected = x.double() / torch.tensor(scale, dtype=torch.float64)[:, None] * weight.double()
    assert_close(ops.rms_norm(x, weight, 0.5), expected.to(dtype))


@ops_tables
@dtypes
@rows
def test_add_rms_norm_is_the_norm_of_the_rounded_sum(ops: Ops, n: int, dtype: torch.dtype) -> None:
    x, residual = normal(n, 100, dtype=dtype), normal(n, 100, dtype=dtype, seed=1)
    weight = normal(100, dtype=dtype, seed=2)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert_close(normed, ops.rms_norm(x + residual, weight, 1e-5))


@ops_tables
@dtypes
@rows
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_product_with_the_transpose(ops: Ops, n: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = normal(n, 63, dtype=dtype), normal(41, 63, dtype=dtype, seed=1) / 8
    bias = normal(41, dtype=dtype, seed=2) if biased else None
    expected = torch.einsum("ni,oi->no", x.double(), weight.double()) + (bias.double() if bias is not None else 0)
    assert_close(ops.linear(x, weight, bias), expected.to(dtype))


@ops_tables
@dtypes
@rows
def test_silu_mul_gates_the_second_half_by_the_first(ops: Ops, n: int, dtype: torch.dtype) -> None:
    gate_up = normal(n, 2 * 37, dtype=dtype)
    gate, up = gate_up[:, :37].double(), gate_up[:, 37:].double()
    assert_close(ops.silu_mul(gate_up), (gate / (1 + (-gate).exp()) * up).to(dtype))
