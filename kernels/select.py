"""Which logits of a row are the largest, exactly and without a sort: by the bits of the values, group by group.

A row is cut into groups of GROUP tokens. One pass over the logits leaves each group's largest value and sum of weights;
from these follows a value that the wanted logits reach, and only groups that reach it are read again. What those hold
from it on, the candidates, is mostly few enough to be searched in registers. Where it is not, histograms over ever
shorter ranges of values find the cut: slower, and as exact.

Values are compared as integers of the same order. Weights are relative to the likeliest token's and integers too, so
that their sums are the same in any order.
"""

import triton
import triton.language as tl

from aiollm.kernels.processed import GROUP, processed

ROOM = tl.constexpr(1024)  # for candidates
PAIRS = tl.constexpr(128)  # candidates that are few enough to compare all with all
BINS = tl.constexpr(1024)  # of a histogram
ONE = tl.constexpr(float(1 << 40))  # the weight of the likeliest token: 2**23 such still add up in 63 bits
LIGHTEST = tl.constexpr(41.0)  # tokens further from the likeliest, in binary orders of magnitude, weigh nothing
ALL = tl.constexpr(1 << 62)  # more than there are of anything
NONE = tl.constexpr(-(1 << 31))  # below every key
IMPOSSIBLE = tl.constexpr(-(1 << 31) + 0x7FFFFF)  # the key of -inf
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def order(x):
    """float32 -> int32 keys of the same order; the two zeros are equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value(key):
    """The float32 of a key; -inf of NONE."""
    key = tl.maximum(key, IMPOSSIBLE)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight(x, peak, scale):
    """int64: 2**((x - peak) * scale), where that of the likeliest token, `peak`, is ONE."""
    return (tl.exp2((x - peak) * scale) * ONE).to(tl.int64)


@triton.jit
def group_statistics(x, scale):
    """x [n, GROUP] -> each group's largest value and sum of 2**((x - largest) * scale); NaN where x has NaN or +inf."""
    peak = tl.max(x, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak) * scale
    zeros = tl.zeros_like(x)
    return peak, tl.sum(tl.exp2(tl.fma(x, zeros + scale, zeros - base[:, None])), 1)


@triton.jit
def kth_bound(keys, low, high, k):
    """keys [n] -> a key from `low` on that at least k of them reach, if k reach `low`; `high` is the largest key.

    It is the largest such key but for a 2**18th of the range.
    """
    PIVOTS: tl.constexpr = 4
    at = tl.arange(0, PIVOTS)
    step = (high.to(tl.int64) - low + 1 + PIVOTS - 1) // PIVOTS
    for _ in range(9):
        pivots = tl.minimum(low + step * at, high).to(tl.int32)
        reached = tl.sum((keys[None, :] >= pivots[:, None]).to(tl.int32), 1)
        low = tl.maximum(tl.max(tl.where(reached >= k, pivots, NONE), 0), low)
        step = (step + PIVOTS - 1) // PIVOTS
    return low


@triton.jit
def mass_bound(peaks, masses, target):
    """The least d (in 12 steps) such that the tokens of a weight below 2**-d weigh at most `target` together.

    peaks [n] <= 0: exponents (base 2) of the weight of each group's likeliest token; masses [n]: weights of the groups.
    A group whose likeliest token is above 2**-d has GROUP - 1 others, each below it or not counted.
    """
    others = tl.maximum(masses - tl.exp2(peaks), 0.0)
    near = tl.full((), 0.0, tl.float32)
    step = tl.full((), LIGHTEST, tl.float32)
    for _ in range(12):
        step = step * 0.5
        exponent = -(near + step)
        light = tl.minimum(others, tl.exp2(exponent) * (GROUP - 1))
        below = tl.sum(tl.where(peaks < exponent, masses, light), 0)
        near = tl.where(below > target, near + step, near)
    return near + step


@triton.jit
def list_groups(keys, low, LIST, RANKS, groups, N: tl.constexpr):
    """List the groups whose largest key, keys [N], reaches `low`, in ascending order -> how many they are."""
    at = tl.arange(0, N)
    listed = (keys >= low) & (at < groups)
    rank = tl.cumsum(listed.to(tl.int32), 0) - 1
    tl.store(LIST + rank, at, mask=listed)
    tl.store(RANKS + at, tl.where(listed, rank, -1), mask=at < groups)
    tl.debug_barrier()
    return tl.sum(listed.to(tl.int32), 0)


@triton.jit
def read_groups(source, first, LISTED: tl.constexpr, PROCESSED: tl.constexpr, TILE: tl.constexpr):
    """The logits of the (listed) groups from `first` on, and their tokens: float32 and int32 [TILE / GROUP, GROUP].

    `source` is (logits, stride, vocab, list, ranks, listed, rules, scratch), where `rules` and `scratch` may be empty
    unless PROCESSED. What is past the vocabulary or the list is -inf, and its token is past the vocabulary.
    """
    logits, stride, vocab, LIST, RANKS, listed, rules, scratch = source
    group = first + tl.arange(0, TILE // GROUP)
    if LISTED:
        group = tl.load(LIST + group, mask=group < listed, other=(1 << 31) // GROUP - 1)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + ids.to(tl.int64) * stride, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    if PROCESSED:
        x = processed(x, ids, first, rules, vocab, RANKS, scratch, LISTED, TILE)
    return x, ids


@triton.jit
def gather(source, low, high, KEYS, IDS, CHUNK: tl.constexpr):
    """Store the keys in [low, high] of the listed groups and their tokens, in ascending order of these, as candidates;
    those that find no ROOM are only counted -> how many there are."""
    count = tl.zeros([], tl.int32)
    tl.debug_barrier()
    for first in range(0, source[5], CHUNK // GROUP):
        x, ids = read_groups(source, first, True, True, CHUNK)
        ids = tl.reshape(ids, [CHUNK])
        keys = tl.reshape(order(x), [CHUNK])
        hit = (keys >= low) & (keys <= high) & (ids < source[2])
        at = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        room = hit & (at < ROOM)
        tl.store(KEYS + at, keys, mask=room)
        tl.store(IDS + at, ids, mask=room)
        count += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def _cut_of_few(KEYS, count, low, need, by_mass, peak, scale):
    """See find_cut: among at most PAIRS candidates, each compared with each -> the cut, number and weight above it."""
    at = tl.arange(0, PAIRS)
    keys = tl.load(KEYS + at, mask=at < count, other=NONE)
    measures = tl.zeros([PAIRS], tl.int64)
    for begin in range(0, count, 32):
        other = begin + tl.arange(0, 32)
        others = tl.load(KEYS + other, mask=other < count, other=NONE)
        units = tl.where(by_mass, weight(value(others), peak, scale), (others > NONE).to(tl.int64))
        measures += tl.sum(tl.where(others[None, :] >= keys[:, None], units[None, :], 0), 1)
    cut = tl.maximum(tl.max(tl.where(measures >= need, keys, NONE), 0), low)
    above = keys > cut
    return cut, tl.sum(above.to(tl.int64), 0), tl.sum(tl.where(above, weight(value(keys), peak, scale), 0), 0)


@triton.jit
def _cut_by_histograms(source, low, high, need, by_mass, peak, scale, KEYS, count, COUNTS, MASSES, CHUNK: tl.constexpr):
    """See find_cut: each pass counts and weighs the keys in BINS parts of the range in which the cut lies -> the cut,
    number and weight above it. A pass goes over the listed groups, or over the candidates as soon as these are all keys
    of the range; those there were may be lost."""
    count_above = tl.full((), 0, tl.int64)
    mass_above = tl.full((), 0, tl.int64)
    span = high.to(tl.int64) - low + 1
    at = tl.arange(0, BINS)
    lane = tl.arange(0, CHUNK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    while span > 1:
        groups = tl.where(count <= ROOM, tl.cdiv(count, GROUP), source[5])
        shift = tl.full((), 0, tl.int32)
        while ((span - 1) >> shift) >= BINS:
            shift += 1
        tl.debug_barrier()
        tl.store(COUNTS + at, 0)
        tl.store(MASSES + at, 0)
        tl.debug_barrier()
        for first in range(0, groups, CHUNK // GROUP):
            if count <= ROOM:
                keys = tl.load(KEYS + first * GROUP + lane, mask=first * GROUP + lane < count, other=NONE)
                x = value(keys)
            else:
                x, ids = read_groups(source, first, True, True, CHUNK)
                keys = tl.where(ids < source[2], order(x), NONE)
            inside = (keys >= low) & (keys <= low + (span - 1).to(tl.int32))
            place = ((keys - low).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32)
            tl.atomic_add(COUNTS + place, 1, mask=inside, sem="relaxed")
            tl.atomic_add(MASSES + place, weight(x, peak, scale), mask=inside, sem="relaxed")
        tl.debug_barrier()
        counts = tl.load(COUNTS + at, cache_modifier=".cg").to(tl.int64)
        masses = tl.load(MASSES + at, cache_modifier=".cg")
        measures = tl.where(by_mass, masses, counts)
        reached = tl.where(by_mass, mass_above, count_above) + tl.cumsum(measures, 0, reverse=True) >= need
        place = tl.max(tl.where(reached, at, 0), 0)
        count_above += tl.sum(tl.where(at > place, counts, 0), 0)
        mass_above += tl.sum(tl.where(at > place, masses, 0), 0)
        low += place << shift
        span = tl.full((), 1, tl.int64) << shift
        if (count > ROOM) & (shift > 0):
            count = tl.sum(tl.where(at == place, counts, 0), 0).to(tl.int32)
            if count <= ROOM:
                count = gather(source, low, low + (span - 1).to(tl.int32), KEYS, KEYS + ROOM, CHUNK)
    return low, count_above, mass_above


@triton.jit
def find_cut(source, low, high, need, by_mass, peak, scale, KEYS, count, COUNTS, MASSES, CHUNK: tl.constexpr):
    """The largest key in [low, high] such that the keys from it on number `need`, or weigh that much if by_mass; `low`
    if even all do not. There are `count` keys from `low` on, which are the candidates if there is ROOM for them.

    -> (cut, how many of the keys equal to it are needed, the weight of those above it)
    """
    if count <= PAIRS:
        low, count_above, mass_above = _cut_of_few(KEYS, count, low, need, by_mass, peak, scale)
    else:
        low, count_above, mass_above = _cut_by_histograms(
            source, low, high, need, by_mass, peak, scale, KEYS, count, COUNTS, MASSES, CHUNK
        )
    unit = tl.where(by_mass, tl.maximum(weight(value(low), peak, scale), 1), 1)
    missing = need - tl.where(by_mass, mass_above, count_above)
    return low, (missing + unit - 1) // unit, mass_above
