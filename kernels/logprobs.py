"""Log-probabilities of given tokens, their ranks, and the likeliest ones; the contract is ref/logprobs.py.

One pass over the logits leaves each group's largest, its sum of exponentials, and how many are as large as the given
token's; from these come the total, the rank, and the few groups that hold the likeliest tokens.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.processed import GROUP
from aiollm.kernels.select import IMPOSSIBLE, LOG2_E, NONE, group_statistics, order, read_groups, value
from aiollm.kernels.tuned import lookup
from aiollm.kernels.workload import Case, Shape

CANDIDATES = [
    {"TILE": tile, "TILE_WARPS": few, "num_warps": warps}
    for tile, few in ((2048, 4), (1024, 4), (4096, 8))
    for warps in (4, 2, 8)
]
PROGRAMS = 1056  # 8 for each multiprocessor of an H100: 16 KB each in flight covers the latency of its memory


@triton.jit
def log_total(PEAKS, SUMS, groups, N: tl.constexpr):
    """Statistics of one row -> its groups' largest logits [N], and the logarithm of the sum of all exponentials, NaN
    where the logits hold NaN or +inf."""
    at = tl.arange(0, N)
    peaks = tl.load(PEAKS + at, mask=at < groups, other=float("-inf"))
    sums = tl.load(SUMS + at, mask=at < groups, other=0.0)
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return peaks, base + tl.log(tl.sum(sums * tl.exp2((peaks - base) * LOG2_E), 0))


@triton.jit
def alternatives(logits, stride, vocab, peaks, total, TOP_IDS, TOP_LOGPROBS, top_n, N: tl.constexpr):
    """Write the top_n likeliest tokens of a row and their logprobs, one after the other, equal ones by their ids.

    peaks [N]: the largest logit of each group that is not yet written; the group that has the largest is read again.
    """
    at = tl.arange(0, N)
    lane = tl.arange(0, GROUP)
    keys = tl.where(at * GROUP < vocab, tl.maximum(order(peaks), IMPOSSIBLE), NONE)
    last = tl.full((), (1 << 31) - 1, tl.int32)
    last_id = tl.full((), -1, tl.int32)
    for i in range(top_n):
        key = tl.max(keys, 0)
        group = tl.min(tl.where(keys == key, at, N - 1), 0)
        ids = group * GROUP + lane
        x = tl.load(logits + ids.to(tl.int64) * stride, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        own = tl.where((ids < vocab) & (x == x), order(x), NONE)
        own = tl.where((own < last) | ((own == last) & (ids > last_id)), own, NONE)  # not yet written
        last = key
        last_id = tl.min(tl.where(own == key, ids, vocab - 1), 0)
        tl.store(TOP_IDS + i, last_id.to(tl.int64))
        tl.store(TOP_LOGPROBS + i, value(key) - total)
        rest = tl.max(tl.where((own < key) | ((own == key) & (ids > last_id)), own, NONE), 0)
        keys = tl.where(at == group, rest, keys)


@triton.jit
def _statistics(
    LOGITS, row_stride, stride, vocab, groups, TARGETS, PEAKS, SUMS, COUNTS, TILE: tl.constexpr, PDL: tl.constexpr
):
    trigger(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = TILE // GROUP
    source = (LOGITS + row * row_stride, stride, vocab, PEAKS, PEAKS, groups, (), ())
    own = tl.load(LOGITS + row * row_stride + tl.load(TARGETS + row) * stride).to(tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(vocab, TILE), tl.num_programs(1)):
        group = tile * TILES + tl.arange(0, TILES)
        x, ids = read_groups(source, tile * TILES, False, False, TILE)
        peak, total = group_statistics(x, LOG2_E)
        count = tl.sum(((x >= own) & (ids < vocab)).to(tl.int32), 1)
        tl.store(PEAKS + row * groups + group, peak, mask=group < groups)
        tl.store(SUMS + row * groups + group, total, mask=group < groups)
        tl.store(COUNTS + row * groups + group, count, mask=group < groups)


@triton.jit(do_not_specialize=["top_n"])
def _report(
    LOGITS, row_stride, stride, vocab, groups, TARGETS, PEAKS, SUMS, COUNTS, LOGPROBS, RANKS, TOP_IDS, TOP_LOGPROBS,
    top_n, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * row_stride
    at = tl.arange(0, N)
    counts = tl.load(COUNTS + row * groups + at, mask=at < groups, other=0)
    tl.store(RANKS + row, tl.sum(counts, 0).to(tl.int64))
    peaks, total = log_total(PEAKS + row * groups, SUMS + row * groups, groups, N)
    target = tl.load(TARGETS + row)
    tl.store(LOGPROBS + row, tl.load(logits + target * stride).to(tl.float32) - total)
    alternatives(logits, stride, vocab, peaks, total, TOP_IDS + row * top_n, TOP_LOGPROBS + row * top_n, top_n, N)


def logprobs(
    logits: torch.Tensor, targets: torch.Tensor, top_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [r, vocab], targets [r] int64 -> (logprobs [r], ranks [r] int64, top_ids [r, top_n] int64,
    top_logprobs [r, top_n]).

    Equal ones stand in the order of their ids. Errors: ValueError if top_n is above the vocabulary.
    """
    rows, vocab = logits.shape
    check_top(top_n, vocab)
    groups = triton.cdiv(vocab, GROUP.value)
    device = logits.device
    own, top = torch.empty(rows, device=device), torch.empty(rows, top_n, device=device)
    ids, ranks = (torch.empty(size, dtype=torch.int64, device=device) for size in ((rows, top_n), (rows,)))
    if not rows:
        return own, ranks, ids, top
    peaks, sums = torch.empty(rows, groups, device=device), torch.empty(rows, groups, device=device)
    counts = torch.empty(rows, groups, dtype=torch.int32, device=device)
    # The number of rows is no part of the key: the order in which a row's sums are added up must not depend on it.
    config = lookup("logprobs", {"vocab": vocab, "dtype": str(logits.dtype)}, CANDIDATES[0])
    early = pdl(device)
    shape = (logits, logits.stride(0), logits.stride(1), vocab, groups, targets, peaks, sums, counts)
    _statistics[(rows, splits(rows, triton.cdiv(vocab, config["TILE"])))](
        *shape, TILE=config["TILE"], num_warps=config["TILE_WARPS"], **early
    )
    _report[(rows,)](
        *shape, own, ranks, ids, top, top_n, N=triton.next_power_of_2(groups), num_warps=config["num_warps"], **early
    )
    return own, ranks, ids, top


def splits(rows: int, tiles: int) -> int:
    """How many programs share the tiles of a row; what a tile gives does not depend on it."""
    return min(tiles, -(-PROGRAMS // rows))


def check_top(top_n: int, vocab: int) -> None:
    """Errors: ValueError if more alternatives are asked for than there are tokens."""
    if not 0 <= top_n <= vocab:
        raise ValueError(f"top_n: {top_n} alternatives; a vocabulary of {vocab} has from 0 to {vocab}")


def cases(shape: Shape) -> Iterator[Case]:
    """A slice of a prompt, with and without alternatives."""
    for top_n in (0, 5):

        def make(device: torch.device, top_n: int = top_n) -> tuple[torch.Tensor, torch.Tensor, int]:
            logits = (torch.randn(256, shape.vocab, device=device) * 3).to(shape.dtype)
            return logits, torch.randint(shape.vocab, (256,), device=device), top_n

        moved = 256 * shape.vocab * shape.dtype.itemsize
        yield Case("logprobs", f"256 rows top {top_n}", make, bytes=moved, expected=_stable)


def _stable(logits: torch.Tensor, targets: torch.Tensor, top_n: int) -> tuple[torch.Tensor, ...]:
    """The reference, with equal alternatives in the order that the kernel gives them."""
    shares = logits.float().log_softmax(-1)
    values, ids = shares.sort(dim=-1, descending=True, stable=True)
    ranks = (logits >= logits.gather(1, targets[:, None])).sum(1)
    return shares.gather(1, targets[:, None]).squeeze(1), ranks, ids[:, :top_n], values[:, :top_n]
