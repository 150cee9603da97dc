"""Draw one row's token from the statistics of its groups of tokens, by the processed logits of a few of these."""

import triton
import triton.language as tl

from aiollm.kernels.processed import GROUP
from aiollm.kernels.select import (
    ALL,
    BINS,
    LIGHTEST,
    LOG2_E,
    NONE,
    ONE,
    ROOM,
    find_cut,
    gather,
    kth_bound,
    list_groups,
    mass_bound,
    order,
    read_groups,
    value,
    weight,
)


@triton.jit
def scale_of(temperature):
    """What turns a difference of logits into an exponent of base 2; finite for the least temperature."""
    # Triton 3.7's interpreter takes a constant only on the right of a tensor.
    return tl.minimum((tl.zeros_like(temperature) + LOG2_E) / tl.where(temperature > 0, temperature, 1.0), 1e38)


@triton.jit
def _target(number, total):
    """floor(number / 2**64 * total): the tokens up to the drawn one weigh more than this, those before it do not."""
    return tl.umulhi(number, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _kept(keys, x, cut, ties, least, peak, scale):
    """Weights of those of [n] logits that lie above the cut, and of the first `ties` that lie on it."""
    on = keys == cut
    kept = (keys > cut) | (on & (tl.cumsum(on.to(tl.int32), 0) <= ties))
    return tl.where(kept & (x - peak >= least), weight(x, peak, scale), 0)


@triton.jit
def _shares(STATISTICS, groups, peak, scale, N: tl.constexpr):
    """The processed groups' largest logits, the exponents (base 2) of their weights, and the groups' weights, [N]."""
    at = tl.arange(0, N)
    peaks = tl.load(STATISTICS + 2 * groups + at, mask=at < groups, other=float("-inf"))
    sums = tl.load(STATISTICS + 3 * groups + at, mask=at < groups, other=0.0)
    exponents = (peaks - peak) * scale
    return peaks, exponents, sums * tl.exp2(exponents)


@triton.jit
def _weigh_groups(source, groups, cut, least, peak, scale, TIES, MASSES, N: tl.constexpr, CHUNK: tl.constexpr):
    """By a pass over the listed groups: what each group's tokens above the cut weigh, and how many lie on it."""
    at = tl.arange(0, N)
    tl.debug_barrier()
    tl.store(TIES + at, 0, mask=at < groups)
    tl.store(MASSES + at, 0, mask=at < groups)
    tl.debug_barrier()
    for first in range(0, source[5], CHUNK // GROUP):
        x, ids = read_groups(source, first, True, True, CHUNK)
        keys = order(x)
        group = tl.min(ids, 1) // GROUP
        mass = tl.sum(tl.where((keys > cut) & (x - peak >= least), weight(x, peak, scale), 0), 1)
        tl.store(MASSES + group, mass, mask=group < groups)
        tl.store(TIES + group, tl.sum((keys == cut).to(tl.int32), 1), mask=group < groups)
    tl.debug_barrier()


@triton.jit
def _filter(
    source, groups, STATISTICS, peak, scale, top_k, top_p, min_p, least, by_k, by_p, number, INTS, MASSES,
    N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """top_k, top_p and min_p keep the first tokens of the order by logit and id: all above a cut, some of those on it.

    -> (the drawn token if all kept ones are candidates, else -1 and the groups are weighed; the cut; how many of those
    on it are kept)
    """
    LIST, RANKS, KEYS, IDS = INTS, INTS + groups, INTS + 2 * groups, INTS + 2 * groups + ROOM
    COUNTS = IDS + ROOM
    peaks, exponents, shares = _shares(STATISTICS, groups, peak, scale, N)
    mass = tl.sum((shares * ONE).to(tl.int64), 0)
    far = (tl.zeros_like(scale) + LIGHTEST) / scale
    if by_p & (not by_k):
        # A thousandth less than what may be left out, for the rounding of the groups' sums.
        far = mass_bound(exponents, shares, tl.sum(shares, 0) * (1 - top_p) * 0.999) / scale
    if not (by_k | by_p):
        far = tl.minimum(far, -least)
    high = order(peak)
    low = order(peak - far) - 1  # the least value that rounds to that distance
    if by_k:
        low = kth_bound(order(peaks), low, high, top_k)
    listed = list_groups(order(peaks), low, LIST, RANKS, groups, N)
    logits, stride, vocab, _, _, _, rules, scratch = source
    source = (logits, stride, vocab, LIST, RANKS, listed, rules, scratch)
    count = listed  # at least: each of the groups has a key from `low` on
    if listed <= ROOM:
        count = gather(source, low, high, KEYS, IDS, CHUNK)
    cut = low
    ties = tl.full((), ALL, tl.int64)
    for by_mass in range(2):
        if tl.where(by_mass == 1, by_p, by_k):
            need = tl.where(by_mass == 1, tl.ceil(mass.to(tl.float64) * top_p).to(tl.int64), top_k.to(tl.int64))
            found, wanted, above = find_cut(
                source, cut, high, need, by_mass == 1, peak, scale, KEYS, count, COUNTS, MASSES, CHUNK
            )
            ties = tl.where(found == cut, tl.minimum(ties, wanted), wanted)
            cut = found
            mass = above + ties * weight(value(cut), peak, scale)
    token = tl.full((), -1, tl.int32)
    if count <= ROOM:
        slot = tl.arange(0, ROOM)
        keys = tl.load(KEYS + slot, mask=slot < count, other=NONE)
        ids = tl.load(IDS + slot, mask=slot < count, other=vocab)
        weights = _kept(keys, value(keys), cut, ties, least, peak, scale)
        target = _target(number, tl.sum(weights, 0))
        token = tl.min(tl.where(tl.cumsum(weights, 0) > target, ids, vocab), 0)
    else:
        _weigh_groups(source, groups, cut, least, peak, scale, COUNTS, MASSES, N, CHUNK)
    return token, cut, ties


@triton.jit
def draw(
    logits, stride, vocab, groups, STATISTICS, peak, temperature, top_k, top_p, min_p, number, INTS, MASSES, rules,
    scratch, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The token of a row that has one: among the candidates, or first its group and then the token in that."""
    scale = scale_of(temperature)
    random = temperature > 0
    by_k = random & (top_k > 0) & (top_k < vocab)
    by_p = random & (top_p < 1)
    by_distance = random & (min_p > 0)
    filtered = by_k | by_p | by_distance
    least = tl.where(by_distance, temperature * tl.log(tl.maximum(min_p, 1e-37)), float("-inf"))
    source = (logits, stride, vocab, INTS, INTS, groups, rules, scratch)
    token = tl.full((), -1, tl.int32)
    cut = tl.full((), NONE, tl.int32)
    ties = tl.full((), 0, tl.int64)
    if filtered:
        token, cut, ties = _filter(
            source, groups, STATISTICS, peak, scale, top_k, top_p, min_p, least, by_k, by_p, number, INTS, MASSES, N,
            CHUNK,
        )  # fmt: skip
    if token < 0:
        at = tl.arange(0, N)
        peaks, _, shares = _shares(STATISTICS, groups, peak, scale, N)
        masses = (shares * ONE).to(tl.int64)
        on_cut = tl.zeros([N], tl.int64)
        if filtered:
            TIES = INTS + 2 * groups + 2 * ROOM
            on_cut = tl.load(TIES + at, mask=at < groups, other=0, cache_modifier=".cg").to(tl.int64)
            on_cut = tl.minimum(on_cut, tl.maximum(ties - (tl.cumsum(on_cut, 0) - on_cut), 0))
            unit = tl.where(value(cut) - peak >= least, weight(value(cut), peak, scale), 0)
            masses = tl.load(MASSES + at, mask=at < groups, other=0, cache_modifier=".cg") + on_cut * unit
        target = _target(number, tl.sum(masses, 0))
        group = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
        if not random:
            group = tl.min(tl.where(peaks == peak, at, N), 0)
        rest = target - tl.sum(tl.where(at < group, masses, 0), 0)
        ties = tl.sum(tl.where(at == group, on_cut, 0), 0)
        x, _ = read_groups(source, group, False, True, GROUP)
        x = tl.reshape(x, [GROUP])
        lane = tl.arange(0, GROUP)
        weights = _kept(order(x), x, cut, ties, least, peak, scale)
        # A group's sum may be rounded to a little more than its tokens weigh: the last with a weight gets the rest.
        place = tl.sum((tl.cumsum(weights, 0) <= rest).to(tl.int32), 0)
        place = tl.minimum(place, tl.max(tl.where(weights > 0, lane, 0), 0))
        if not random:
            place = tl.min(tl.where(x == peak, lane, GROUP), 0)
        token = group * GROUP + place
    return token


def scratch_ints(groups: int) -> int:
    """Integers that `draw` writes to: two for each group, two for each candidate, one for each bin or group."""
    return 2 * (groups + int(ROOM.value)) + max(int(BINS.value), groups)
