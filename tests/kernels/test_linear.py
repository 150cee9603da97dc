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
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_product_with_the_transpose(ops: Ops, n: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = normal(n, 63, dtype=dtype), normal(41, 63, dtype=dtype, seed=1) / 8
    bias = normal(41, dtype=dtype, seed=2) if biased else None
    expected = torch.einsum("ni,oi->no", x.double(), weight.double()) + (bias.double() if bias is not None else 0)
    assert_close(ops.linear(x, weight, bias), expected.to(dtype))
