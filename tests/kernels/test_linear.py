import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.tolerance import TOLERANCE, assert_close

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
rows = pytest.mark.parametrize("n", ROWS)
int8_tables = pytest.mark.parametrize(
    "ops",
    [
        pytest.param(reference_ops(), id="reference"),
        pytest.param(cpu_ops(), id="cpu", marks=pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")),
    ],
)


@ops_tables
@dtypes
@rows
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_the_product_with_the_transpose(ops: Ops, n: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight = normal(n, 63, dtype=dtype), normal(41, 63, dtype=dtype, seed=1) / 8
    bias = normal(41, dtype=dtype, seed=2) if biased else None
    expected = torch.einsum("ni,oi->no", x.double(), weight.double()) + (bias.double() if bias is not None else 0)
    assert_close(ops.linear(x, weight, bias), expected.to(dtype))


@int8_tables
@rows
@pytest.mark.parametrize("biased", [False, True])
def test_over_8_bit_weights_it_is_the_product_of_what_the_integers_stand_for(ops: Ops, n: int, biased: bool) -> None:
    x, weight = normal(n, 63) * torch.logspace(-4, 4, n)[:, None], normal(41, 63, seed=1) / 8
    bias = normal(41, seed=2) if biased else None
    integers = reference_ops().quantize(weight)
    dense = integers.values.double() * integers.scales.double()[:, None]
    exactly = x.double() @ dense.T
    # Each number of x is off by half a step of 1 / (127 * 254) of the row's peak at most.
    most = x.abs().amax(1, keepdim=True).double() / (127 * 254) * 0.51 * dense.abs().sum(1) + 1e-6 * exactly.abs()
    plain = ops.linear(x, ops.quantize(weight), None)
    assert bool(((plain.double() - exactly).abs() <= most).all())
    assert_close(ops.linear(x, ops.quantize(weight), bias), plain + bias if bias is not None else plain)


@pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("shape", [(41, 63), (192, 576), (64, 1536)], ids=str)
@rows
def test_the_cpus_8_bit_product_is_the_references(shape: tuple[int, int], n: int) -> None:
    weight, x = normal(*shape, seed=1) / 16, normal(n, shape[1])
    reference, cpu = reference_ops(), cpu_ops()
    assert_close(cpu.linear(x, cpu.quantize(weight), None), reference.linear(x, reference.quantize(weight), None))


@int8_tables
@pytest.mark.parametrize("n", [2, 17, 64, 200])
def test_over_8_bit_weights_no_row_changes_another(ops: Ops, n: int) -> None:
    weight, x = ops.quantize(normal(192, 576, seed=1)), normal(n, 576)
    x[0] *= 1e6
    together = ops.linear(x, weight, None)
    alone = torch.cat([ops.linear(row[None], weight, None) for row in x])
    assert torch.equal(together, alone)


@int8_tables
def test_over_8_bit_weights_zeros_stay_zero_and_what_is_not_finite_stays_in_its_row(ops: Ops) -> None:
    x = normal(4, 63)
    x[1], x[2, 5], x[3, 7] = 0, torch.nan, torch.inf
    y = ops.linear(x, ops.quantize(normal(41, 63, seed=1)), None)
    assert bool(y[0].isfinite().all()) and not y[1].any()
    assert not y[2:].isfinite().any()
