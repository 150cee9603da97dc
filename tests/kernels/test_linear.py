from typing import Any

import pytest
import torch

from aiollm.kernels.cases import ROWS, in_float32, make_layer, normal, on
from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops
from aiollm.kernels.tolerance import TOLERANCE, assert_close, assert_near

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


SIZES = [(41, 63), (128, 192), (64, 600)]  # outputs and inputs; rows of 63 elements lie unaligned
COUNTS = [0, 1, 2, 17, 65]  # around the borders between the kernels


@pytest.mark.parametrize("neighbours", ["", "bias", "norm", "norm residual", "bias norm residual"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@dtypes
@pytest.mark.parametrize("n", COUNTS)
def test_tritons_linear_is_the_references(
    device: torch.device, n: int, dtype: torch.dtype, size: tuple[int, int], neighbours: str
) -> None:
    x, weight, bias, before = make_layer(n, size, dtype)
    residual = normal(n, size[0], dtype=dtype, seed=4)
    chosen = [v if name in neighbours else None for name, v in (("bias", bias), ("norm", before), ("resid", residual))]
    expected = reference_ops().linear(*in_float32(x, weight, *chosen))
    assert_near(triton_ops().linear(*on(device, x, weight, *chosen)).cpu(), expected)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_triton_takes_rows_and_weights_that_are_parts_of_wider_tensors(device: torch.device, n: int) -> None:
    x, weight, _, _ = make_layer(n, (64, 128), torch.float32)
    wide_x, wide_weight = (torch.cat([part, torch.full_like(part, torch.nan)], 1).to(device) for part in (x, weight))
    actual = triton_ops().linear(wide_x[:, :128], wide_weight[:, :128])
    assert_close(actual.cpu(), reference_ops().linear(x, weight))


@pytest.mark.parametrize("n", [1, 5, 100])
@pytest.mark.parametrize("by", [{"centered": True}, {"bias": normal(192, seed=5)}, {}], ids=["layer", "shifted", "rms"])
def test_triton_norms_with_a_centre_or_a_bias_too(device: torch.device, n: int, by: dict[str, Any]) -> None:
    x, weight, bias, before = make_layer(n, (64, 192), torch.float32)
    before = before._replace(**by)
    expected = reference_ops().linear(x + 1, weight, bias, before)
    assert_close(triton_ops().linear(*on(device, x + 1, weight, bias, before)).cpu(), expected)


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@dtypes
@rows
def test_a_layer_with_its_neighbours_is_their_composition(ops: Ops, n: int, dtype: torch.dtype) -> None:
    x, weight, bias, before = make_layer(n, (64, 96), dtype)
    residual = normal(n, 64, dtype=dtype, seed=4)
    alone = ops.linear(ops.norm(x, before), weight, bias)
    assert_close(ops.linear(x, weight, bias, before, residual.clone()), residual + alone)
