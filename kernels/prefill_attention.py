"""Ragged causal attention of sequences that bring several tokens: as many operations a second as the card has.

One program computes one query head of one tile of new tokens, against keys and values gathered slot by slot: online
softmax (Milakov and Gimelshein, 2018) in the loop order of FlashAttention-2 (Dao, 2023). The list of tiles is laid out
on the device, once for a step, as only the device knows the lengths. Hopper has a kernel of its own, prefill_hopper.py.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from aiollm.kernels import device as devices
from aiollm.kernels import prefill_hopper as hopper
from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import triton_ops
from aiollm.kernels.ref.attention import attention as reference
from aiollm.kernels.tuned import Config, lookup
from aiollm.kernels.variants import Scoring
from aiollm.kernels.workload import Case, Shape

CANDIDATES: list[Config] = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((128, 128, 8), (128, 64, 8), (128, 32, 8), (128, 64, 4), (64, 64, 4), (64, 32, 8), (64, 32, 4))
    for stages in (2, 3, 4)
]
ROOMY = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}  # 160 KiB of shared memory at a width of 128
SMALL = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
WIDE = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}  # what 256 columns leave registers for
FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
FLOAT32_WIDE = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
TILE = hopper.TILE.value
HIDDEN = tl.constexpr(-1e30)  # finite, as a row may see no key of the first blocks, and -inf less -inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)


class Prefill(NamedTuple):
    """The tiles of new tokens, those that see the most keys first: so the last programs to start end soon."""

    tiles: torch.Tensor  # [bound, 4] int32: first packed token, packed end of the sequence, row, first token's position
    counters: torch.Tensor  # [3] int32: how many tiles there are; two for prefill_hopper.py, 0 between launches


def plan_prefill(batch: Batch) -> Prefill:
    """The tiles of the sequences that bring more than one token. One launch, whose grid depends on sizes alone."""
    n, device = batch.rows.shape[0], batch.starts.device
    bound = triton.cdiv(batch.positions.shape[0], TILE) + n
    tiles = torch.empty((bound, 4), dtype=torch.int32, device=device)
    counters = torch.empty(3, dtype=torch.int32, device=device)
    if n:
        _plan[(n,)](batch.starts, batch.lengths, batch.rows, tiles, counters, n, TILE=TILE, BLOCK=64, num_warps=4)
    return Prefill(tiles, counters)


@triton.jit(do_not_specialize=["n"])
def _plan(starts, lengths, rows, tiles, counters, n, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Each program places the tiles of one sequence; the first one counts all tiles."""
    s = tl.program_id(0)
    begin = tl.load(starts + s)
    end = tl.load(starts + s + 1)
    row = tl.load(rows + s).to(tl.int32)
    new = end - begin
    cached = tl.load(lengths + s) - new
    own = tl.where(new > 1, tl.cdiv(new, TILE), 0)
    if s == 0:
        total = 0
        for first in range(0, n, BLOCK):
            _, _, other_tiles = _sequences(starts, lengths, first + tl.arange(0, BLOCK), n, TILE)
            total += tl.sum(other_tiles)
        tl.store(counters, total)
        tl.store(counters + 1, 0)
        tl.store(counters + 2, 0)
    for at in range(0, own, BLOCK):
        tile = at + tl.arange(0, BLOCK)
        seen = cached + tl.minimum((tile + 1) * TILE, new)
        # A tile's place is the number of those before it: they see more keys, or as many in an earlier sequence.
        place = tl.zeros([BLOCK], tl.int32)
        for first in range(0, n, BLOCK):
            other = first + tl.arange(0, BLOCK)
            other_cached, other_length, other_tiles = _sequences(starts, lengths, other, n, TILE)
            least = seen[:, None] + tl.where(other >= s, 1, 0)[None, :]
            tile_of_least = tl.maximum(tl.cdiv(least - other_cached[None, :], TILE), 1)  # counted from 1
            before = 1 + tl.maximum(other_tiles[None, :] - tile_of_least, 0)
            some = (other_tiles > 0)[None, :] & (other_length[None, :] >= least)
            place += tl.sum(tl.where(some, before, 0), 1)
        entry = tiles + place * 4
        here = tile < own
        tl.store(entry, begin + tile * TILE, mask=here)
        tl.store(entry + 1, tl.zeros([BLOCK], tl.int32) + end, mask=here)
        tl.store(entry + 2, tl.zeros([BLOCK], tl.int32) + row, mask=here)
        tl.store(entry + 3, cached + tile * TILE, mask=here)


@triton.jit
def _sequences(starts, lengths, at, n, TILE: tl.constexpr):
    """Cached tokens, lengths and numbers of tiles of the sequences `at`."""
    new = tl.load(starts + at + 1, mask=at < n, other=0) - tl.load(starts + at, mask=at < n, other=0)
    length = tl.load(lengths + at, mask=at < n, other=0)
    return length - new, length, tl.where(new > 1, tl.cdiv(new, TILE), 0)


def prefill_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: Batch,
    scoring: Scoring,
    out: torch.Tensor,
    share: torch.Tensor | None = None,
) -> None:
    """Write the rows of `out` that belong to sequences of more than one new token; the contract is ref/attention.py.

    q and out [tokens, hq, d] and the pools [slots + 1, hkv, d] may have any strides with d contiguous. `batch.plan` has
    a field `prefill`, what `plan_prefill` gave; it is not empty. `share` [1] int32, on Hopper alone, is how many
    multiprocessors it takes; then the kernel launched next may begin at once, and looks at `out` after it has waited.
    """
    if hopper.fits(q, k_pool, v_pool):
        hopper.prefill_hopper(q, k_pool, v_pool, batch, scoring, out, share)
        return
    assert share is None, "only prefill_hopper shares multiprocessors"
    (tokens, heads, width), kv_heads = q.shape, k_pool.shape[1]
    key: dict[str, int | str] = {"tokens": tokens, "width": str(width), "dtype": str(q.dtype).removeprefix("torch.")}
    config = lookup("prefill_attention", key, _default(q))
    tiles, counters = batch.plan.prefill
    bound = tiles.shape[0]
    _prefill[(bound * (TILE // config["BLOCK_M"]) * heads,)](
        q, k_pool, v_pool, out, tiles, counters, batch.slot_table, scoring.slopes, scoring.sinks, bound,
        scoring.scale, scoring.window, scoring.softcap,
        *q.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2], *out.stride()[:2], batch.slot_table.stride(0),
        GROUP=heads // kv_heads, WIDTH=width, D=max(16, triton.next_power_of_2(width)), TILE=TILE,
        WINDOW=scoring.window > 0, SOFTCAP=scoring.softcap > 0, **config,
    )  # fmt: skip


def _default(q: torch.Tensor) -> Config:
    wide = q.shape[2] > 128
    if q.dtype == torch.float32:
        return FLOAT32_WIDE if wide else FLOAT32
    if wide:
        return WIDE
    return ROOMY if devices.shared_memory(q.device) > 200 << 10 else SMALL


@triton.jit
def _prefill(
    q, k_pool, v_pool, out, tiles, counters, slot_table, slopes, sinks, bound, scale, window, softcap,
    q_token, q_head, k_slot, k_head, v_slot, v_head, out_token, out_head, table_row,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The query heads of a KV head run side by side, and all tiles of a KV head before the next: its keys stay in L2.
    program = tl.program_id(0)
    PARTS: tl.constexpr = TILE // BLOCK_M
    group, program = program % GROUP, program // GROUP
    part, program = PARTS - 1 - program % PARTS, program // PARTS
    entry, kv_head = program % bound, program // bound
    if entry >= tl.load(counters):
        return
    first = tl.load(tiles + entry * 4) + part * BLOCK_M
    end = tl.load(tiles + entry * 4 + 1)
    row = tl.load(tiles + entry * 4 + 2)
    start = tl.load(tiles + entry * 4 + 3) + part * BLOCK_M  # position of the first query
    new = tl.minimum(end - first, BLOCK_M)
    if new <= 0:
        return
    head = kv_head * GROUP + group

    m_at = tl.arange(0, BLOCK_M)
    d_at = tl.arange(0, D)
    token = (first + m_at).to(tl.int64)[:, None]
    inside = (m_at < new)[:, None] & (d_at < WIDTH)[None, :]
    queries = tl.load(q + token * q_token + head * q_head + d_at[None, :], mask=inside, other=0.0)
    position = start + m_at

    # Scores in units of log 2; with a soft cap, `scale` is what the tangent is taken of.
    slope = 0.0
    if SOFTCAP:
        scale = scale / softcap * (2 * LOG2E)
        softcap = softcap * LOG2E
    else:
        scale = scale * LOG2E
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2E
    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head) * LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_M, D], tl.float32)

    # Keys [lowest, seen) are seen by some query; those of the blocks from every_low to every_high by all.
    seen = start + new
    lowest = 0
    every_low = 0
    every_high = (start + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        lowest = tl.maximum(start - window + 1, 0)
        every_low = tl.cdiv(tl.maximum(seen - window, 0), BLOCK_N) * BLOCK_N
    slots = slot_table + row.to(tl.int64) * table_row
    keys = k_pool + kv_head * k_head
    values = v_pool + kv_head * v_head
    if WINDOW:
        acc, total, top = _span(
            acc, total, top, queries, keys, values, slots, lowest // BLOCK_N * BLOCK_N, tl.minimum(every_low, seen),
            lowest, seen, position, scale, window, softcap, slope, k_slot, v_slot, d_at,
            slopes is not None, WIDTH, D, WINDOW, SOFTCAP, True, BLOCK_N,
        )  # fmt: skip
    acc, total, top = _span(
        acc, total, top, queries, keys, values, slots, every_low, every_high,
        lowest, seen, position, scale, window, softcap, slope, k_slot, v_slot, d_at,
        slopes is not None, WIDTH, D, WINDOW, SOFTCAP, False, BLOCK_N,
    )  # fmt: skip
    acc, total, top = _span(
        acc, total, top, queries, keys, values, slots, tl.maximum(every_low, every_high), seen,
        lowest, seen, position, scale, window, softcap, slope, k_slot, v_slot, d_at,
        slopes is not None, WIDTH, D, WINDOW, SOFTCAP, True, BLOCK_N,
    )  # fmt: skip

    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + token * out_token + head * out_head + d_at[None, :], result, mask=inside)


@triton.jit
def _span(
    acc, total, top, queries, keys, values, slots, begin, end,
    lowest, seen, position, scale, window, softcap, slope, k_slot, v_slot, d_at,
    ALIBI: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the keys at positions begin to end: `top` is each row's highest score, `total` its sum of weights."""
    # Outside [lowest, seen) the table may hold what is no slot; what a masked key reads must be finite.
    slot = tl.load(slots + tl.minimum(tl.maximum(begin + tl.arange(0, BLOCK_N), lowest), seen - 1))
    for low in range(begin, end, BLOCK_N):
        at = low + tl.arange(0, BLOCK_N)
        place = slot.to(tl.int64)[:, None]
        if WIDTH == D:
            key = tl.load(keys + place * k_slot + d_at[None, :])
            value = tl.load(values + place * v_slot + d_at[None, :])
        else:
            key = tl.load(keys + place * k_slot + d_at[None, :], mask=(d_at < WIDTH)[None, :], other=0.0)
            value = tl.load(values + place * v_slot + d_at[None, :], mask=(d_at < WIDTH)[None, :], other=0.0)
        # Read here, a block ahead, the slots keep no load waiting: all stages are left for keys and values.
        slot = tl.load(slots + tl.minimum(tl.maximum(at + BLOCK_N, lowest), seen - 1))
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        rescale = scale
        if SOFTCAP:
            scores = (1.0 - 2.0 / (1.0 + tl.exp2(scores * scale))) * softcap
            rescale = 1.0
        if ALIBI:
            scores = scores * rescale - slope * (position[:, None] - at[None, :]).to(tl.float32)
            rescale = 1.0
        if MASKED:
            visible = at[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (at[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores * rescale, HIDDEN)
            rescale = 1.0
        new_top = tl.maximum(top, tl.max(scores, 1) * rescale)
        weights = tl.exp2(scores * rescale - new_top[:, None])
        factor = tl.exp2(top - new_top)
        total = total * factor + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * factor[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


def cases(shape: Shape) -> Iterator[Case]:
    """Prompts, chunks after a cached prefix, and both beside rows of one token; slots scattered, the plan laid out by
    an earlier layer."""
    hq, hkv, d = shape.heads, shape.kv_heads, shape.head_dim
    for label, sequences in {
        "1 x 16k": [(0, 16384)], "2 x 8k": [(0, 8192)] * 2, "4 x 4k": [(0, 4096)] * 4, "64 x 128": [(0, 128)] * 64,
        "2k after 2k": [(2048, 2048)], "2k after 30k": [(30000, 2048)], "500": [(0, 500)],
        "96 x 1100, 928": [(1099, 1)] * 96 + [(0, 928)], "96 x 4500, 2k after 2k": [(4499, 1)] * 96 + [(2048, 2048)],
    }.items():  # fmt: skip

        def make(device: torch.device, sequences: list[tuple[int, int]] = sequences) -> tuple[Any, ...]:
            new = torch.tensor([n for _, n in sequences], device=device, dtype=torch.int32)
            lengths = torch.tensor([c + n for c, n in sequences], device=device, dtype=torch.int32)
            tokens, held, longest = (
                sum(n for _, n in sequences), sum(c + n for c, n in sequences), max(c + n for c, n in sequences)
            )  # fmt: skip
            q = torch.randn(tokens, hq, d, device=device, dtype=shape.dtype)
            pools = torch.randn(2, held + 1, hkv, d, device=device, dtype=shape.dtype)
            places = ((lengths.cumsum(0) - lengths)[:, None] + torch.arange(longest, device=device)).clamp(max=held - 1)
            table = torch.randperm(held, device=device, dtype=torch.int32)[places]
            rows = torch.arange(len(sequences), device=device)
            starts = torch.cat([new.new_zeros(1), new.cumsum(0, dtype=torch.int32)])
            nothing = torch.empty(tokens, device=device, dtype=torch.int64)  # positions and slots: only their number
            most = max(n for _, n in sequences)
            batch = Batch(rows, starts, lengths, nothing, nothing, table, most, longest)
            return q, *pools.unbind(), triton_ops().plan(batch, hkv), Scoring(d**-0.5)

        pairs = sum(n * c + n * (n + 1) // 2 for c, n in sequences)
        read = 2 * sum(c + n for c, n in sequences) * hkv + 2 * sum(n for _, n in sequences) * hq
        moved = read * d * shape.dtype.itemsize
        yield Case("attention", label, make, bytes=moved, flops=4 * pairs * hq * d, expected=_in_chunks)


def _in_chunks(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scoring: Scoring
) -> torch.Tensor:
    """The reference, 128 new tokens at a time: its scores of a long prompt would not fit into memory."""
    outs = []
    for i, (begin, end) in enumerate(zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True)):
        for first in range(begin, end, 128):
            last = min(first + 128, end)
            piece = batch._replace(
                rows=batch.rows[i : i + 1],
                starts=batch.starts.new_tensor([0, last - first]),
                lengths=batch.lengths[i : i + 1] - (end - last),
            )
            outs.append(reference(q[first:last], k_pool, v_pool, piece, scoring))
    return torch.cat(outs)
