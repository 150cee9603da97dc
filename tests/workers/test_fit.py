"""What is refused before a model is read, and what is said where memory runs out: figures are made up."""

import pytest
import torch

from aiollm.workers import fit

GIB = 1 << 30


@pytest.mark.parametrize(
    ("weights", "free", "fraction"), [(15 * GIB, 16 * GIB, 1.0), (15 * GIB, 15 * GIB, 1.0), (15 * GIB, 20 * GIB, 0.8)]
)
def test_what_may_fit_is_not_refused(weights: int, free: int, fraction: float) -> None:
    fit.check(weights, 0, free, 24 * GIB, on_gpu=True, data_type="bf16", fraction=fraction)


@pytest.mark.parametrize(
    ("weights", "tables", "on_gpu", "data_type", "fraction", "said", "unsaid"),
    [
        (140, 1, True, "bf16", 1.0, ["140.00 GiB (bf16)", "1.00 GiB", "has 78.00 GiB free", "--tp", "smaller model"],
         ["--mem_fraction", "--data_type", "--running_max_req_size"]),
        (140, 1, True, "fp32", 1.0, ["--tp", "--data_type", "bf16 or fp16"], ["--mem_fraction"]),
        (70, 1, True, "bf16", 0.5, ["--mem_fraction 0.5 leaves 38.00 GiB", "raise --mem_fraction"], []),
        (90, 1, False, "fp32", 1.0, ["this machine has 78.00 GiB free", "int8"], ["--tp", "--mem_fraction"]),
        (10, 90, True, "bf16", 1.0, ["row tables of 90.00 GiB", "--running_max_req_size"], ["--tp", "smaller model"]),
    ],
)  # fmt: skip
def test_a_refusal_has_the_figures_and_the_flags_that_help(
    weights: int, tables: int, on_gpu: bool, data_type: str, fraction: float, said: list[str], unsaid: list[str]
) -> None:
    with pytest.raises(MemoryError) as refused:
        fit.check(
            weights * GIB, tables * GIB, 78 * GIB, 80 * GIB, on_gpu=on_gpu, data_type=data_type, fraction=fraction
        )
    text = str(refused.value)
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text


def test_errors_that_say_there_is_no_memory_are_told_from_others() -> None:
    assert fit.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert fit.ran_out(RuntimeError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError) as none:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert fit.ran_out(none.value)
    assert not fit.ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not fit.ran_out(ValueError("CUDA error: out of memory"))


@pytest.mark.parametrize(
    ("phase", "flags"),
    [
        ("loading weights", ["--tp", "--data_type", "--running_max_req_size"]),
        ("measuring memory", ["--batch_max_tokens"]),
        ("capturing graphs", ["--disable_cudagraph", "--mem_fraction"]),
    ],
)
def test_memory_that_ran_out_is_told_with_the_phase_and_its_flags(phase: str, flags: list[str]) -> None:
    text = fit.exhausted(phase, on_gpu=True)
    assert f"the GPU ran out of memory while {phase}" in text and all(flag in text for flag in flags)
    assert "--tp" not in fit.exhausted(phase, on_gpu=False)
