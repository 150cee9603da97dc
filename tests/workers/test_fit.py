"""What is refused before a model is read, and what is said where memory runs out: figures are made up."""

import pytest
import torch

from aiollm.workers import fit

GIB = 1 << 30


@pytest.mark.parametrize(
    ("weights", "free", "fraction"), [(15 * GIB, 16 * GIB, 1.0), (14 * GIB, 15 * GIB, 1.0), (14 * GIB, 20 * GIB, 0.8)]
)
def test_what_may_fit_is_not_refused(weights: int, free: int, fraction: float) -> None:
    fit.check(weights, 0, GIB, free, 24 * GIB, on_gpu=True, data_type="bf16", fraction=fraction)


@pytest.mark.parametrize(
    ("weights", "tables", "on_gpu", "data_type", "fraction", "said", "unsaid"),
    [
        (140, 1, True, "bf16", 1.0, ["140.00 GiB (bf16)", "1.00 GiB", "has 78.00 GiB free", "--tp", "smaller model"],
         ["--mem_fraction", "--data_type", "--running_max_req_size"]),
        (140, 1, True, "fp32", 1.0, ["--tp", "--data_type", "bf16 or fp16"], ["--mem_fraction"]),
        (70, 1, True, "bf16", 0.5, ["--mem_fraction 0.5 leaves 38.00 GiB", "raise --mem_fraction to 0.94"], []),
        (77, 0, True, "bf16", 0.5, ["KV cache of at least 2.00 GiB do not fit", "--tp"], ["raise --mem_fraction"]),
        (10, 1, True, "bf16", 0.1, ["raise --mem_fraction to 0.19"], []),
        (90, 1, False, "fp32", 1.0, ["this machine has 78.00 GiB free", "int8"], ["--tp", "--mem_fraction"]),
        (10, 90, True, "bf16", 1.0, ["row tables of 90.00 GiB", "--running_max_req_size"], ["--tp", "smaller model"]),
    ],
)  # fmt: skip
def test_a_refusal_has_the_figures_and_the_flags_that_help(
    weights: int, tables: int, on_gpu: bool, data_type: str, fraction: float, said: list[str], unsaid: list[str]
) -> None:
    sizes = weights * GIB, tables * GIB, 2 * GIB, 78 * GIB, 80 * GIB
    with pytest.raises(MemoryError) as refused:
        fit.check(*sizes, on_gpu=on_gpu, data_type=data_type, fraction=fraction)
    text = str(refused.value)
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text


@pytest.mark.parametrize(("needed", "free"), [(73, 78), (2, 78), (78, 78), (1, 1), (5, 33)])
def test_the_fraction_that_is_advised_is_the_least_that_does(needed: int, free: int) -> None:
    sizes = needed * GIB, 0, 0, free * GIB, 80 * GIB
    enough = fit.least_fraction(needed * GIB, free * GIB, 80 * GIB)
    fit.check(*sizes, on_gpu=True, data_type="bf16", fraction=float(enough))
    with pytest.raises(MemoryError):
        fit.check(*sizes, on_gpu=True, data_type="bf16", fraction=float(enough) - 0.01)
    assert fit.least_fraction(free * GIB + 1, free * GIB, 80 * GIB) == ""


def test_a_cache_that_does_not_fit_is_refused_with_the_size_that_would() -> None:
    assert fit.granted(440000, 440000, 421119) == 440000, "more than would be taken unasked"
    with pytest.raises(MemoryError, match=r"^--max_total_token_num 3000000000 does not fit: 421119 would$"):
        fit.granted(3_000_000_000, 440000, 421119)
    with pytest.raises(MemoryError, match=r"does not fit: 5 would$"):
        fit.granted(6, 5, 0)
    with pytest.raises(MemoryError, match=r"does not fit: nothing is left for the KV cache$"):
        fit.granted(6, 0, 0)


def test_beside_what_is_not_loaded_yet_the_size_is_a_bound() -> None:
    text = r"^--max_total_token_num 9 does not fit beside weights of 1 GiB: at most about 4 would$"
    with pytest.raises(MemoryError, match=text):
        fit.granted(9, 8, 4, " beside weights of 1 GiB")
    assert fit.granted(8, 8, 4, " beside weights of 1 GiB") == 8


def test_what_an_allocator_did_not_give_is_told_with_what_was_free_and_what_would_fit() -> None:
    text = fit.not_given(1000, 12 * GIB, 10 * GIB, 800, on_gpu=True)
    assert "a KV cache of 1000 tokens takes 12.00 GiB, which the GPU did not give (10.00 GiB were free): " in text
    assert "--max_total_token_num 800 would fit" in text and "--tp" in text
    text = fit.not_given(1000, 12 * GIB, 20 * GIB, 0, on_gpu=False)
    assert "lower --max_total_token_num" in text and "--tp" not in text


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
