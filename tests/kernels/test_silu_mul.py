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
def test_silu_mul_gates_the_second_half_by_the_first(ops: Ops, n: int, dtype: torch.dtype) -> None:
    gate_up = normal(n, 2 * 37, dtype=dtype)
    gate, up = gate_up[:, :37].double(), gate_up[:, 37:].double()
    assert_close(ops.silu_mul(gate_up), (gate / (1 + (-gate).exp()) * up).to(dtype))
