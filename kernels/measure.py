"""Whether an operation is right, how long it takes on a GPU whose caches are cold, and what that GPU can do at best."""

import datetime
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton

from aiollm.kernels import device as devices
from aiollm.kernels.workload import Case

GRAPH_US = 300.0  # least work in one graph: the few microseconds that its start takes are then about 1 %
SETS = 64  # most calls in one graph
MEMORY = 8 << 30  # bytes of arguments that are held for one graph, if more than one set of them


class Ceilings(NamedTuple):
    """What this GPU reaches at best."""

    copy: float  # bytes/s of a copy within device memory, read plus written
    matmul: float  # floating-point operations/s of an 8192^3 product in bf16


def arguments(case: Case, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Fresh arguments, the same for the same seed."""
    torch.manual_seed(seed)
    return case.make(device)


class Expectation(NamedTuple):
    """What the reference returns, and the tensors among its arguments before and after."""

    result: Any
    before: list[torch.Tensor]
    after: list[torch.Tensor]


def expectation(case: Case, device: torch.device) -> Expectation:
    """That of `arguments(case, device)`."""
    given = arguments(case, device)
    before = [tensor.clone() for tensor in tensors(given)]
    return Expectation(case.reference(given), before, list(tensors(given)))


def check(case: Case, device: torch.device, expected: Expectation) -> None:
    """Compare the operation with the reference: what it returns, and what it leaves in its arguments.

    An argument whose memory the result took is not compared. Errors: AssertionError names the case and the difference.
    """
    given = arguments(case, device)
    before = [tensor.clone() for tensor in tensors(given)]
    result = case.run(given)
    taken = {part.untyped_storage().data_ptr() for part in tensors(result)}
    try:
        if case.agree is not None:
            case.agree(given, result, expected.result)
        else:
            for ours, theirs in zip(tensors(result), tensors(expected.result), strict=True):
                _compare(case, ours, theirs)
        each = zip(before, tensors(given), expected.before, expected.after, strict=True)
        for ours_before, ours, theirs_before, theirs in each:
            if ours.untyped_storage().data_ptr() not in taken:
                _compare_left(case, (ours_before, ours), (theirs_before, theirs))
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{case.op} {case.label}: {error}") from error


def _compare(case: Case, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    (case.close if ours.is_floating_point() else torch.testing.assert_close)(ours, theirs)


def _compare_left(
    case: Case, ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """An argument before and after, here and there. Where it was not the same before it is memory that nobody has
    written yet; and guards against reading what is not to be read are NaN."""
    (our_bits_before, our_bits), (their_bits_before, their_bits) = (tuple(map(_bits, pair)) for pair in (ours, theirs))
    if torch.equal(our_bits, their_bits):
        return
    changed = (our_bits_before == their_bits_before) & (our_bits != their_bits)
    if changed.any():
        _compare(case, ours[1][changed], theirs[1][changed])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def argument_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """Arguments for as many calls as one graph is to hold."""
    sets = [arguments(case, device)]
    size = max(1, sum(t.numel() * t.element_size() for t in tensors(sets[0])))
    least_us = 1 + max(case.bytes / 4e6, case.flops / 1e9)  # at 4 TB/s and 1 PFLOP/s
    count = max(1, min(SETS, math.ceil(GRAPH_US / least_us), MEMORY // size))
    return sets + [arguments(case, device, seed) for seed in range(1, count)]


def microseconds(
    case: Case, device: torch.device, replays: int = 20, sets: Sequence[tuple[Any, ...]] | None = None
) -> float:
    """Median time of one call within a CUDA graph, in which each call has arguments of its own; L2 holds none of them.

    `sets` are `argument_sets` that were made before.
    """
    sets = sets or argument_sets(case, device)
    case.run(sets[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in sets:
            case.run(given)
    unrelated = torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    return statistics.median(event_us(graph.replay, replays, before=unrelated.amax)) / len(sets)


def reference_microseconds(case: Case, device: torch.device) -> float:
    """Median time of one call of the reference, launched by Python as it is."""
    given = arguments(case, device)
    return statistics.median(event_us(lambda: case.reference(given), 3))


def ceilings(device: torch.device) -> Ceilings:
    """Measured here and now."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(event_us(lambda: target.copy_(source), 20))
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    matmul = statistics.median(event_us(lambda: a @ b, 20))
    return Ceilings(2 * source.numel() * 4 / copy * 1e6, 2 * 8192**3 / matmul * 1e6)


def facts(device: torch.device) -> dict[str, str]:
    """What a measurement is worth nothing without."""
    return {
        "gpu": devices.facts(device).name,
        "driver": _driver(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def event_us(call: Callable[[], Any], times: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Times of `call` in microseconds, by events; one warm call goes first. `before` runs before each, outside."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in events:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
