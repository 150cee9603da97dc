import math
from collections.abc import Callable

import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.gated import gated as triton_gated
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.ref.gated import gated
from aiollm.kernels.tolerance import TOLERANCE, assert_close

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("n", ROWS)

FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}
activations = pytest.mark.parametrize("activation", FORMULAS)


@ops_tables
@dtypes
@rows
@activations
def test_the_first_half_gates_the_second(ops: Ops, n: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = normal(n, 2 * 37, dtype=dtype)
    gate, up = gate_up[:, :37].double(), gate_up[:, 37:].double()
    assert_close(ops.gated(gate_up, activation), (FORMULAS[activation](gate) * up).to(dtype))


@dtypes
@activations
@pytest.mark.parametrize(("n", "width"), [(0, 37), (1, 37), (5, 96), (2, 1100)])
def test_triton_gates_as_the_reference(
    n: int, width: int, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = normal(n, 2 * width, dtype=dtype) * 3
    gate_up[:, ::7] *= 10  # where the activations are flat
    assert_close(triton_gated(gate_up.to(device), activation).cpu(), gated(gate_up, activation))


def test_triton_gates_strided_rows(device: torch.device) -> None:
    wide = normal(5, 96)
    assert_close(triton_gated(wide.to(device)[:, 16:80], "silu").cpu(), gated(wide[:, 16:80], "silu"))


def test_triton_gated_says_what_it_cannot_take(device: torch.device) -> None:
    with pytest.raises(ValueError, match="'relu'"):
        triton_gated(torch.ones(1, 8, device=device), "relu")


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("n", [63, 1000, 70_000])  # more rows than a grid's second axis counts
def test_triton_gates_large_inputs(n: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(n, 2 * 4608, dtype=dtype, device=device)
    assert_close(triton_gated(gate_up, "silu"), gated(gate_up, "silu"))
