import pytest
import torch

from aiollm.kernels.cases import normal
from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.cpu.quantize import quantize as cpu_quantize
from aiollm.kernels.ref.quantize import quantize


def test_each_row_is_rounded_by_its_own_scale() -> None:
    weight = normal(41, 63) * torch.logspace(-6, 6, 41)[:, None]
    values, scales = quantize(weight)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    assert bool((values.abs().amax(1) == 127).all())
    errors = (values.double() * scales.double()[:, None] - weight.double()).abs().amax(1)
    assert bool((errors <= 0.5001 * scales).all())


def test_a_row_of_zeros_stays_zero() -> None:
    weight = normal(3, 8)
    weight[1] = 0
    values, scales = quantize(weight)
    assert not values[1].any() and scales[1] == 0 and scales[2] > 0


@pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")
def test_the_cpu_keeps_the_scales_and_one_byte_a_number() -> None:
    weight = normal(41, 63)
    assert torch.equal(cpu_quantize(weight).scales, quantize(weight).scales)
    assert cpu_quantize(weight).values.nbytes == weight.numel()


def test_a_cpu_that_would_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.kernels.cpu.quantize.exact", lambda: False)
    with pytest.raises(RuntimeError, match="AVX-512 VNNI"):
        cpu_quantize(normal(2, 2))
