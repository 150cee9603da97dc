"""How much of a GPU's memory a worker needs besides weights and KV cache: measured on steps of the largest sizes."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from aiollm.workers.gpu import Capture
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import Draw, Forward, Size, early

ACTIVATIONS, GRAPHS, OTHERS = "activations of the largest step", "graphs", "driver, kernels and other processes"
RESERVED = (ACTIVATIONS, GRAPHS)  # not taken yet while the KV cache is being sized
TRIED = 4  # forwards that are captured to see what each takes
DRAW_SHARE = 8  # of a forward's nodes a drawing has less: 8 launches to 260 where there are 36 layers


def measured(make: Callable[[], ModelRunner], every: list[Size], graphs: bool) -> list[tuple[str, int]]:
    """What a runner like the one that is made takes for steps of the sizes `every`, (what, bytes).

    That one is given up, with its pools. `graphs` tells whether steps will be captured: then all sizes share the memory
    of the largest; besides, the driver keeps something for each, which is measured on a few of them.
    """
    runner = make()
    forwards = [size for size in every if isinstance(size, Forward)]
    draws = [size for size in every if isinstance(size, Draw)]
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    for chosen in (forwards[0], draws[0]):  # nothing is captured yet: they are only computed
        runner.graphs.capture(chosen)
    activations = torch.cuda.max_memory_allocated() - base
    captured = 0
    if graphs:
        runner.graphs.begin(Capture(), every)
        before = _held()
        some: list[Size] = list(dict.fromkeys([*forwards[:: max(1, len(forwards) // TRIED)], forwards[-1]]))
        for chosen in [*some, draws[0]]:
            runner.graphs.capture(chosen)
        after = _held()
        own = max(0, after.by_driver - before.by_driver) // len(some)
        captured = after.by_torch - before.by_torch + len(forwards) * own + len(draws) * own // DRAW_SHARE
    del runner
    return [(ACTIVATIONS, activations), (GRAPHS, captured), (OTHERS, _held().by_driver)]


def capture(
    runner: ModelRunner, every: list[Size], progress: Callable[[float], None], tokens: int, per_token: int
) -> None:
    """Capture what every step finds a size among; the rest follows in idle times, but for several ranks, which would
    have to agree on it: they capture all of it now. Raises MemoryError where there is no room beside a KV cache of so
    many tokens, of so many bytes each."""
    now = every if runner.tp.size > 1 else early(every)
    runner.graphs.begin(Capture(), every)
    before, _ = torch.cuda.mem_get_info()
    try:
        for done, size in enumerate(now):
            runner.graphs.capture(size)
            progress((done + 1) / len(now))
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if "out of memory" not in str(error):  # the driver lacks it where a graph is made ready
            raise
        made, taken = len(runner.graphs), before - torch.cuda.mem_get_info()[0]
        fewer = beside_graphs(tokens, per_token, made, len(now), taken)
        value = f" to {fewer}" if fewer else ""
        raise MemoryError(
            f"{made} of {len(now)} graphs fit beside a KV cache of {tokens} tokens: lower --mem_fraction, or"
            f" --max_total_token_num{value}, or serve without graphs (--disable_cudagraph)"
        ) from error


def beside_graphs(tokens: int, per_token: int, made: int, wanted: int, taken: int) -> int:
    """Tokens for which there is room when the graphs that are missing take as much each as those that were made, which
    are the larger ones; 0 where it cannot be told."""
    if not made:
        return 0
    missing = -(-(wanted - made) * max(0, taken) // made)
    return max(0, tokens - -(-missing // per_token))


class Held(NamedTuple):
    """Bytes of a GPU that are taken."""

    by_torch: int  # for tensors and the memory of graphs
    by_driver: int  # for contexts, kernels and the nodes of graphs, and by other processes


def _held() -> Held:
    """Once nothing is held that nobody uses."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    by_torch = torch.cuda.memory_reserved()
    return Held(by_torch, max(0, total - free - by_torch))
