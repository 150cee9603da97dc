"""How much of a GPU's memory a worker needs besides weights and KV cache: measured on steps of the largest sizes."""

import gc
from collections.abc import Callable

import torch

from aiollm.workers.gpu import Capture
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import TOP, Draw, early, sizes

ACTIVATIONS, GRAPHS, OTHERS = "activations of the largest step", "graphs", "driver, kernels and other processes"
RESERVED = (ACTIVATIONS, GRAPHS)  # not taken yet while the KV cache is being sized
LEAST_GRAPH = 1 << 20  # bytes that a graph is taken to need at least


def measured(make: Callable[[], ModelRunner], graphs: bool) -> list[tuple[str, int]]:
    """What a runner like the one that is made takes, (what, bytes); that one is given up, with its pools.

    `graphs` tells whether steps will be captured: then all sizes share the memory of the largest, and each has nodes
    of its own.
    """
    runner = make()
    rows = runner.state.hold
    every = sizes(rows, runner.budget)
    forward, draw = every[0], Draw(TOP, rows)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    runner.graphs.begin(lambda work: work, [])  # what is only called again is launched kernel by kernel
    runner.graphs.capture(forward)
    runner.graphs.capture(draw)
    activations = torch.cuda.max_memory_allocated() - base
    captured = 0
    if graphs:
        runner.graphs.begin(Capture(), [])
        before = _free()
        runner.graphs.capture(forward)
        runner.graphs.capture(draw)
        shared = before - _free()
        runner.graphs.capture(next(size for size in every if size != forward and not isinstance(size, Draw)))
        own = max(LEAST_GRAPH, before - shared - _free())
        captured = shared + own * len(every)
    del runner
    _free()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return [(ACTIVATIONS, activations), (GRAPHS, captured), (OTHERS, max(0, others))]


def capture(runner: ModelRunner, progress: Callable[[float], None]) -> None:
    """Capture what every step finds a size among; the rest follows in idle times, but for several ranks, which would
    have to agree on it: they capture all of it now. Raises MemoryError where there is no room."""
    every = sizes(runner.state.hold, runner.budget)
    now = every if runner.tp.size > 1 else early(every)
    runner.graphs.begin(Capture(), every)
    try:
        for done, size in enumerate(now):
            runner.graphs.capture(size)
            progress((done + 1) / len(now))
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{len(runner.graphs)} of {len(now)} graphs fit: lower --mem_fraction or --max_total_token_num, or serve"
            " without graphs (--disable_cudagraph)"
        ) from error


def _free() -> int:
    """Bytes that are free once nothing is held that nobody uses."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
