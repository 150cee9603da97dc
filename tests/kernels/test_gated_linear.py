import pytest
import torch

from aiollm.kernels.cases import ROWS, in_float32, make_layer, on
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops
from aiollm.kernels.ref.gated import ACTIVATIONS
from aiollm.kernels.tolerance import TOLERANCE, assert_close, assert_near


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", ROWS)
def test_it_is_a_linear_layer_behind_a_norm_and_before_an_activation(
    ops: Ops, n: int, dtype: torch.dtype, activation: str
) -> None:
    x, weight, bias, before = make_layer(n, (64, 96), dtype)
    expected = ops.gated(ops.linear(ops.norm(x, before), weight, bias), activation)
    assert_close(ops.gated_linear(x, weight, bias, activation, before), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 17, 65])
def test_tritons_gated_linear_is_the_references(
    device: torch.device, n: int, dtype: torch.dtype, activation: str
) -> None:
    x, weight, bias, before = make_layer(n, (64, 600), dtype)
    for arguments in ((weight, bias, activation, before), (weight, None, activation)):
        expected = reference_ops().gated_linear(*in_float32(x, *arguments))
        assert_near(triton_ops().gated_linear(*on(device, x, *arguments)).cpu(), expected)
