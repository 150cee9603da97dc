import math

import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.tolerance import TOLERANCE, assert_close

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("n", ROWS)


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
