import math
from typing import Any

import pytest
import torch

from aiollm.kernels import bench, measure
from aiollm.kernels.ops import reference_ops
from aiollm.kernels.workload import SHAPES, Case, cases


def gated(found: Any) -> Case:
    """A case of `gated` whose expected result is `found` of its arguments."""
    return Case("gated", "3 rows", lambda device: (torch.randn(3, 8, device=device), "silu"), 96, expected=found)


def test_arguments_are_the_same_for_the_same_seed(device: torch.device) -> None:
    case = gated(None)
    first, again, other = (measure.arguments(case, device, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_right_operation_passes_the_check(device: torch.device) -> None:
    case = gated(reference_ops().gated)
    measure.check(case, device, measure.expectation(case, device))


def test_a_wrong_result_fails_the_check_by_name(device: torch.device) -> None:
    case = gated(lambda x, kind: reference_ops().gated(x, kind) + 0.01)
    with pytest.raises(AssertionError, match="gated 3 rows: "):
        measure.check(case, device, measure.expectation(case, device))
    assert [text.splitlines()[0] for text in bench.wrong([case], device)] == [
        "gated 3 rows: Tensor-likes are not close!"
    ]


def test_a_wrong_argument_left_behind_fails_the_check(device: torch.device) -> None:
    def expected(x: torch.Tensor, kind: str) -> torch.Tensor:
        result = reference_ops().gated(x, kind)
        x.zero_()
        return result

    case = gated(expected)
    with pytest.raises(AssertionError, match="gated 3 rows: "):
        measure.check(case, device, measure.expectation(case, device))


def test_an_argument_whose_memory_the_result_took_is_not_compared(device: torch.device) -> None:
    def make(device: torch.device) -> tuple[torch.Tensor]:
        return (torch.randn(3, 8, device=device),)

    class InPlace(Case):
        def run(self, arguments: tuple[torch.Tensor]) -> torch.Tensor:
            return arguments[0].mul_(2)

    case = InPlace("gated", "3 rows", make, 96, expected=lambda x: x * 2)
    measure.check(case, device, measure.expectation(case, device))
    wrong = case._replace(expected=lambda x: x * 3)
    with pytest.raises(AssertionError, match="gated 3 rows: "):
        measure.check(wrong, device, measure.expectation(wrong, device))


def test_memory_that_nobody_has_written_yet_is_not_compared(device: torch.device) -> None:
    """Nor do guards against reading it fail, which are NaN."""
    fresh = iter(range(100))

    def make(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        guarded = torch.tensor([1.0, 2.0, math.nan], device=device)
        return guarded, torch.tensor([5, next(fresh), next(fresh)], device=device)

    class Writes(Case):
        """The first number of the second argument, one more than it was."""

        def run(self, arguments: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            arguments[1][0] += 1
            return arguments[0].nan_to_num(0.0)

    def reference(guarded: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        written[0] += 1
        return guarded.nan_to_num(0.0)

    case = Writes("gated", "3 rows", make, 96, expected=reference)
    measure.check(case, device, measure.expectation(case, device))
    lazy = case._replace(expected=lambda guarded, written: guarded.nan_to_num(0.0))
    with pytest.raises(AssertionError, match="gated 3 rows: "):
        measure.check(lazy, device, measure.expectation(lazy, device))


def test_a_case_may_compare_its_results_as_a_whole(device: torch.device) -> None:
    def agree(given: tuple[torch.Tensor, str], ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert given[1] == "silu" and bool((ours < theirs).all()), "not smaller"

    case = gated(lambda x, kind: reference_ops().gated(x, kind) + 0.01)._replace(agree=agree)
    measure.check(case, device, measure.expectation(case, device))
    wrong = case._replace(expected=reference_ops().gated)
    with pytest.raises(AssertionError, match="gated 3 rows: not smaller"):
        measure.check(wrong, device, measure.expectation(wrong, device))


@pytest.mark.parametrize("at", range(4))
def test_draws_are_checked_as_they_are_in_a_benchmark(device: torch.device, at: int) -> None:
    """Of one row: greedy, plain, a nucleus, and everything."""
    shape = SHAPES["smollm2-135m"]._replace(vocab=500)
    case = [case for case in cases(shape, ["sample"]) if case.label.startswith("1 rows")][at]
    measure.check(case, device, measure.expectation(case, device))


@pytest.mark.gpu
def test_every_call_that_is_timed_and_tuned_is_right(device: torch.device) -> None:
    assert bench.wrong(list(cases(SHAPES["qwen3-8b"])), device) == []


def test_a_result_that_lacks_a_part_fails_the_check(device: torch.device) -> None:
    case = gated(lambda x, kind: (reference_ops().gated(x, kind), x))
    with pytest.raises(AssertionError, match="gated 3 rows: "):
        measure.check(case, device, measure.expectation(case, device))


def test_tensors_are_found_in_nested_tuples() -> None:
    a, b, c = torch.zeros(3)
    assert list(measure.tensors((a, 1, [b, None, ("x", (c,))]))) == [a, b, c]


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    ceilings = measure.Ceilings(copy=2e12, matmul=1e12)
    assert bench.floor_us(Case("gated", "", tuple, 8_000_000, 1_000_000), ceilings) == pytest.approx(4)
    assert bench.floor_us(Case("gated", "", tuple, 8_000_000, 6_000_000), ceilings) == pytest.approx(6)


def test_a_row_shows_rates_and_share() -> None:
    text = bench.line(bench.Row("gated", "3 rows", 8.0, 100.0, 8_000_000, 16_000_000, 4.0))
    assert text.split() == [
        "gated",
        "3",
        "rows",
        "8.00",
        "us",
        "4.00",
        "us",
        "50%",
        "100.0",
        "us",
        "1.00",
        "TB/s",
        "2",
        "TFLOP/s",
    ]


def test_without_a_gpu_the_bench_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["norm"])
    assert "a CUDA device is needed" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_large_norm_takes_longer_than_its_floor_and_a_small_one_less(device: torch.device) -> None:
    found = {case.label: case for case in cases(SHAPES["qwen3-8b"], ["norm"]) if case.op == "norm"}
    small, large = (measure.microseconds(found[label], device) for label in ("1 rows", "4096 rows"))
    assert small < large
    assert large > bench.floor_us(found["4096 rows"], measure.ceilings(device)) * 0.9


@pytest.mark.gpu
def test_the_bench_prints_nothing_of_a_wrong_operation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = gated(lambda x, kind: x)
    monkeypatch.setattr("aiollm.kernels.workload.cases", lambda shape, chosen: [wrong])
    assert bench.main(["gated"]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 cases are wrong: no times" in captured.err
    assert " us" not in captured.out
