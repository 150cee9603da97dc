"""Attention of sequences that bring one token: every cached key and value is read once, at the speed of memory.

Split over the length as in Flash-Decoding (Dao et al., 2023), by the plan of plan.py. A worker whose run of tiles
covers a sequence writes its result; the pieces of a cut sequence go to scratch memory, and the worker that finishes
last adds them up, in the order of the pieces. So a result does not depend on who comes when; but where a sequence is
cut depends on the batch, which changes results by rounding.

Beside prompts (`beside`) it starts while their kernel runs, on the multiprocessors that the plan leaves it.

A tile is some tokens of `heads` neighbouring KV heads: rows of K and V that lie in heads * d contiguous numbers for
each slot. The rows are the long side of the matrix products, so that the few query heads of a group waste little of
the short side; products of a query with another KV head's keys are masked.

While a result is written, the slots and queries of the next sequence are on their way: 437 us for 1,024 x 300 in place
of 450. A program alone on its multiprocessor has few sequences, and would lose 0.2 to 0.8 us; sm_100 would spill. One
loop over the tiles of all sequences, which would load their keys too, is slower: 532.

Measured on an H100 (copy: 3.0 TB/s) with 32 query and 8 KV heads of 128 in bf16, slots in random order:
256 x 4k tokens 3.00 TB/s; 256 x 1k 364 us, 2.95; 1,024 x 192 284 us, 2.83; 256 x 320 118 us, 2.84; 64 x 1k 2.82;
1 x 32k 53 us, 2.54; 1 x 8k 13 us; 1 x 1k 7 us, of which adding up the pieces takes 2; 1 x 128 4 us.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aiollm.kernels import device as devices
from aiollm.kernels.batch import Batch
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.plan import RECORD, Decode, Layout, plan_decode
from aiollm.kernels.tuned import Config, lookup
from aiollm.kernels.variants import Scoring

# TILE: rows of K in a tile; HEADS: the most KV heads in a tile; PER_SM: programs for each multiprocessor.
CANDIDATES: list[Config] = [
    {"TILE": tile, "HEADS": heads, "PER_SM": per_sm, "num_warps": 4, "num_stages": 3}
    for heads in (1, 2, 4, 8)
    for tile, per_sm in ((64, 2), (128, 2), (128, 1))
]
# Few rows are cut often: one KV head keeps the pieces small, 7 us at 1 x 1k where four take 49. Many rows are read best
# in longer runs: at 1,024 x 192 four heads take 284 us, two 288, one 296; at 96 x 1,100 it is 156, 155 and 152. Other
# shapes of the tile, fewer stages or more programs lose 3 to 30 %.
FEW = {"TILE": 128, "HEADS": 1, "PER_SM": 1, "num_warps": 4, "num_stages": 3}  # up to 8 rows
SOME = {"TILE": 64, "HEADS": 1, "PER_SM": 2, "num_warps": 4, "num_stages": 3}  # up to 128
MANY = {"TILE": 64, "HEADS": 4, "PER_SM": 2, "num_warps": 4, "num_stages": 3}
FLOAT32 = {"TILE": 32, "HEADS": 1, "PER_SM": 2, "num_warps": 4, "num_stages": 3}
NARROWEST = 16  # columns: from 16 on Triton uses Hopper's matrix product, which reads K and V in place
COLUMNS = 32  # query heads of a tile, at most, where they are not of one group
COMBINED = 4096  # partial results that a program adds at once: 32 registers of each of 128 threads
PAIRS = 180  # Layout.pairs for each query head of a group. On an H100 150 to 200 is best; at 120, prompts come last
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: a column that saw no key must not become NaN
LOG2E = tl.constexpr(1.4426950408889634)


def _default(rows: int, q: torch.Tensor) -> Config:
    if q.dtype == torch.float32:
        return FLOAT32
    hopper = devices.capability(q.device)[0] == 9  # sm_100 has too few registers for FEW, and for four heads of MANY
    if rows <= 8 and hopper:
        return FEW
    if rows <= (128 if hopper else 32):
        return SOME
    return MANY if hopper else MANY | {"HEADS": 2}


class Tile(NamedTuple):
    """How a tile of a launch looks."""

    heads: int  # KV heads
    block: int  # tokens
    padded: int  # columns for each KV head: its query heads, and padding
    wide: int  # numbers of a head, padded
    stages: int
    per_sm: int  # programs that fit side by side


@functools.cache
def fit(
    rows: int, heads: int, per_sm: int, stages: int, kv_heads: int, group: int, width: int, size: int, room: int
) -> Tile:
    """The tile nearest to what is wished for (the first four) that fits in `room` bytes of shared memory.

    `size` is the bytes of a number, `group` the query heads of a KV head, `width` the numbers of a head.
    """
    power, wide = _power(group), max(16, _power(width))
    # The largest power of two that divides the KV heads is their lowest bit.
    heads = min(heads, kv_heads & -kv_heads, max(1, COLUMNS // power))
    padded = max(power, NARROWEST // heads) if size == 2 else power
    while True:
        fixed = heads * padded * (wide + rows) * size  # q, and the weights on their way to the second product
        stage = 2 * rows * wide * size
        if (room - fixed) // stage > 1 or rows // 2 < max(16, heads):
            stages = max(1, min(stages, (room - fixed) // stage))
            per_sm = max(1, min(per_sm, room // (fixed + stages * stage)))
            return Tile(heads, rows // heads, padded, wide, stages, per_sm)
        rows //= 2


def _power(number: int) -> int:
    """The smallest power of two that is not below it."""
    return 1 << max(number - 1, 0).bit_length()


class Laid(NamedTuple):
    """What a launch needs besides its tensors."""

    config: Config
    tile: Tile
    plan: Decode
    beside: bool


def lay_out(q: torch.Tensor, k_pool: torch.Tensor, batch: Batch, scoring: Scoring, beside: bool) -> Laid:
    """How the sequences of one new token are computed; what a layer before laid out alike is used again.

    With `beside` some multiprocessors are left to prompts: `plan.prompts` of them. The batch is not empty.
    """
    rows, (_, hq, width), kv_heads = _power(batch.rows.shape[0]), q.shape, k_pool.shape[1]
    group, processors = hq // kv_heads, devices.multiprocessors(q.device)
    key: dict[str, int | str] = {
        "rows": rows,
        "kv_heads": kv_heads,
        "group": str(group),
        "width": str(width),
        "dtype": str(q.dtype),
    }
    config = lookup("decode_attention", key, _default(rows, q))
    room = devices.shared_memory(q.device) - 2048  # which reductions take
    wished = config["TILE"], config["HEADS"], config["PER_SM"], config["num_stages"]
    tile = fit(*wished, kv_heads, group, width, q.element_size(), room)
    head_blocks = kv_heads // tile.heads
    workers = max(1, tile.per_sm * processors // head_blocks)
    layout = Layout(scoring.window, tile.block, workers, head_blocks, tile.heads * group, width)
    if beside:
        layout = layout._replace(processors=processors, pairs=PAIRS * group)
    plan = batch.plan.decode.get(layout)
    if plan is None:
        plan = batch.plan.decode[layout] = plan_decode(batch, layout)
    return Laid(config, tile, plan, beside)


def decode_attention(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: Batch,
    scoring: Scoring,
    out: torch.Tensor,
    laid: Laid,
) -> None:
    """Write the rows of `out` that belong to sequences of exactly one new token; the contract is ref/attention.py.

    q [tokens, hq, d] and the pools [slots + 1, hkv, d] may have any strides with d contiguous; out [tokens, hq, d] is
    contiguous. `laid` is what `lay_out` gave for the same. With its `beside` the kernel launched before must be
    prefill_hopper's, for the same layer: nothing else is waited for.
    """
    n, (_, hq, width), kv_heads = batch.rows.shape[0], q.shape, k_pool.shape[1]
    config, tile, plan, beside = laid
    group = hq // kv_heads
    power = _power(group)
    _decode[plan.arrived.shape[1], plan.workers.shape[0]](
        q, k_pool, v_pool, out, batch.slot_table, scoring.slopes, scoring.sinks, *plan[:5],
        n, scoring.scale, scoring.window, scoring.softcap, q.stride(0), q.stride(1), batch.slot_table.stride(0),
        # Known at compile time, strides cost one instruction for an address of 64 bits; otherwise eight.
        K_SLOT=k_pool.stride(0), K_HEAD=k_pool.stride(1), V_SLOT=v_pool.stride(0), V_HEAD=v_pool.stride(1),
        WINDOW=scoring.window > 0, SOFTCAP=scoring.softcap > 0, GROUP=group, PADDED=tile.padded, POWER=power,
        D=width, WIDTH=tile.wide, BLOCK=tile.block, HEADS=tile.heads,
        PARTS=max(1, COMBINED // (tile.heads * power * tile.wide)),
        # The matrix products of these cards read V in place, others would only as the second factor.
        V_FIRST=devices.capability(q.device)[0] in (9, 10) and q.element_size() == 2,
        AHEAD=tile.per_sm > 1 and devices.capability(q.device)[0] == 9, BESIDE=beside,
        num_warps=config["num_warps"], num_stages=tile.stages, **pdl(q.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _decode(
    q, k_pool, v_pool, out, slot_table, slopes, sinks, workers, entries, arrived, pieces, sums,
    n, scale, window, softcap, q_token, q_head, table_row,
    K_SLOT: tl.constexpr, K_HEAD: tl.constexpr, V_SLOT: tl.constexpr, V_HEAD: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, POWER: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    V_FIRST: tl.constexpr, AHEAD: tl.constexpr, BESIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One worker (axis 1) on HEADS of the KV heads (axis 0); columns are their query heads, GROUP padded to PADDED."""
    trigger(PDL)
    if not BESIDE:
        wait(PDL)
    ROWS: tl.constexpr = BLOCK * HEADS
    COLUMNS: tl.constexpr = HEADS * PADDED
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    worker = tl.program_id(1)
    tile = tl.arange(0, ROWS)
    token_of = tile // HEADS
    head_of = tile % HEADS
    column = tl.arange(0, COLUMNS)
    column_head = column // PADDED  # of HEADS
    member = column % PADDED  # of the group
    head = (block * HEADS + column_head) * GROUP + member
    real = member < GROUP
    d = tl.arange(0, WIDTH)
    k_block = k_pool + block * HEADS * K_HEAD
    v_block = v_pool + block * HEADS * V_HEAD
    unit = 1.0 if SOFTCAP else scale  # what makes a product a score before ALiBi
    factor = LOG2E if slopes is not None else unit * LOG2E  # and what makes it a power of two in the end
    slope = tl.zeros([COLUMNS], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=real, other=0.0).to(tl.float32)

    record = workers + worker * RECORD
    per = tl.load(record)
    total = tl.load(record + 1)
    entry = tl.load(record + 2)
    first = tl.load(record + 3)
    last = tl.load(record + 4)
    row = tl.load(record + 5)
    length = tl.load(record + 6)
    token = tl.load(record + 7)
    at = worker * per
    end = tl.minimum(at + per, total)
    position = (at - first) * BLOCK + token_of
    if AHEAD:
        position, slots, query = _first(
            q, q_token, q_head, slot_table, table_row, row, length, token, position, window,
            head, real, d, at < end, D, WINDOW,
        )  # fmt: skip
    while at < end:
        if not AHEAD:
            position, slots, query = _first(
                q, q_token, q_head, slot_table, table_row, row, length, token, (at - first) * BLOCK + token_of, window,
                head, real, d, True, D, WINDOW,
            )  # fmt: skip
        # What is behind the last entry is read and not used.
        next_last = tl.load(entries + entry + 1)
        next_row = tl.load(entries + (n + 2) + entry + 1)
        next_length = tl.load(entries + 2 * (n + 2) + entry + 1)
        next_token = tl.load(entries + 3 * (n + 2) + entry + 1)
        stop = tl.minimum(end, last)
        table = slot_table + row.to(tl.int64) * table_row
        columns = tl.trans(query)
        peak = tl.full([COLUMNS], LOWEST, tl.float32)
        weights = tl.zeros([ROWS, COLUMNS], tl.float32)
        values = tl.zeros([WIDTH, COLUMNS] if V_FIRST else [COLUMNS, WIDTH], tl.float32)
        for _ in range(at, stop):
            k_place = (slots.to(tl.int64) * K_SLOT + head_of * K_HEAD)[:, None] + d[None, :]
            v_place = (slots.to(tl.int64) * V_SLOT + head_of * V_HEAD)[:, None] + d[None, :]
            if WIDTH == D:
                k = tl.load(k_block + k_place)
                v = tl.load(v_block + v_place)
            else:
                k = tl.load(k_block + k_place, mask=(d < D)[None, :], other=0.0)
                v = tl.load(v_block + v_place, mask=(d < D)[None, :], other=0.0)
            slots = tl.load(table + tl.minimum(position + BLOCK, length - 1))  # of the next tile
            score = tl.dot(k, columns, input_precision="ieee")
            if SOFTCAP:
                score = softcap * (1 - 2 / (tl.exp2(score * (2 * LOG2E * scale / softcap)) + 1))
            if slopes is not None:
                score = score * unit - slope[None, :] * (length - 1 - position).to(tl.float32)[:, None]
            seen = (position < length)[:, None] & (head_of[:, None] == column_head[None, :])
            score = tl.where(seen, score, float("-inf"))
            top = tl.maximum(peak, tl.max(score, 0) * factor)
            weight = tl.exp2(score * factor - top[None, :])
            fade = tl.exp2(peak - top)
            weights = weights * fade[None, :] + weight
            if V_FIRST:
                values = tl.dot(tl.trans(v), weight.to(v.dtype), values * fade[None, :], input_precision="ieee")
            else:
                values = tl.dot(tl.trans(weight.to(v.dtype)), v, values * fade[:, None], input_precision="ieee")
            peak = top
            position += BLOCK
        if AHEAD:  # these are under way while the result is written
            position, slots, query = _first(
                q, q_token, q_head, slot_table, table_row, next_row, next_length, next_token, token_of, window,
                head, real, d, stop < end, D, WINDOW,
            )  # fmt: skip
        if not V_FIRST:
            values = tl.trans(values)
        whole = tl.sum(weights, 0)

        result = out + token.to(tl.int64) * (blocks * HEADS * GROUP * D)
        if (at == first) & (stop == last):
            y = values * _share(peak, whole, sinks, head, real)[None, :]
            tl.store(
                result + (head * D)[None, :] + d[:, None], y.to(out.dtype.element_ty),
                mask=real[None, :] & (d < D)[:, None],
            )  # fmt: skip
        else:
            # A worker holds at most two pieces: the rest of an entry begun before (even) and a new one's start (odd).
            place = (2 * worker + (at == first).to(tl.int32)) * blocks + block
            place = place * (HEADS * GROUP) + column_head * GROUP + member
            tl.store(pieces + (place * D)[None, :] + d[:, None], values, mask=real[None, :] & (d < D)[:, None])
            tl.store(sums + 2 * place, peak, mask=real)
            tl.store(sums + 2 * place + 1, whole, mask=real)
            tl.debug_barrier()  # all threads have written before one of them says so
            count = (last - 1) // per - first // per + 1
            if tl.atomic_add(arrived + entry * blocks + block, 1, sem="acq_rel") == count - 1:
                _combine(
                    pieces, sums, result, sinks, first // per, count, block, blocks,
                    GROUP, POWER, HEADS, D, WIDTH, PARTS,
                )  # fmt: skip
                tl.store(arrived + entry * blocks + block, 0)
        at = stop
        entry += 1
        first = last
        last = next_last
        row = next_row
        length = next_length
        token = next_token
    if BESIDE and (block == 0) & (worker == 0):
        wait(PDL)


@triton.jit
def _first(
    q, q_token, q_head, slot_table, table_row, row, length, token, position, window, head, real, d, there,
    D: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of an entry's tile, `position` counted within the window: positions, slots, queries; nothing unless `there`."""
    if WINDOW:
        position += tl.maximum(length - window, 0)
    # Past the length the row's own last slot is read: any other may hold NaN, which no weight of 0 takes out.
    place = row.to(tl.int64) * table_row + tl.minimum(position, length - 1)
    slots = tl.load(slot_table + place, mask=there, other=0)
    query = tl.load(
        q + token.to(tl.int64) * q_token + (head * q_head)[:, None] + d[None, :],
        mask=real[:, None] & (d < D)[None, :] & there, other=0.0,
    )  # fmt: skip
    return position, slots, query


@triton.jit
def _combine(
    pieces, sums, result, sinks, first_worker, count, block, blocks,
    GROUP: tl.constexpr, POWER: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Add up the `count` pieces of an entry that begins at `first_worker`, PARTS at once, and write the result."""
    COLUMNS: tl.constexpr = HEADS * POWER
    column = tl.arange(0, COLUMNS)
    real = column < HEADS * GROUP
    head = block * HEADS * GROUP + column
    d = tl.arange(0, WIDTH)
    peak = tl.full([COLUMNS], LOWEST, tl.float32)
    whole = tl.zeros([COLUMNS], tl.float32)
    values = tl.zeros([COLUMNS, WIDTH], tl.float32)
    for base in range(0, count, PARTS):
        part = base + tl.arange(0, PARTS)
        place = (2 * (first_worker + part) + (part == 0).to(tl.int32)) * blocks + block
        place = column[:, None] + (place * (HEADS * GROUP))[None, :]
        there = real[:, None] & (part < count)[None, :]
        # .cg: other multiprocessors wrote it, so no line of this one's L1 may answer
        their_peak = tl.load(sums + 2 * place, mask=there, other=LOWEST, cache_modifier=".cg")
        their_whole = tl.load(sums + 2 * place + 1, mask=there, other=0.0, cache_modifier=".cg")
        theirs = tl.load(
            pieces + (place * D)[:, :, None] + d[None, None, :],
            mask=there[:, :, None] & (d < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        top = tl.maximum(peak, tl.max(their_peak, 1))
        weight = tl.exp2(their_peak - top[:, None])
        fade = tl.exp2(peak - top)
        whole = whole * fade + tl.sum(their_whole * weight, 1)
        values = values * fade[:, None] + tl.sum(theirs * weight[:, :, None], 1)
        peak = top
    y = values * _share(peak, whole, sinks, head, real)[:, None]
    tl.store(
        result + (head * D)[:, None] + d[None, :], y.to(result.dtype.element_ty), mask=real[:, None] & (d < D)[None, :]
    )


@triton.jit
def _share(peak, whole, sinks, head, real):
    """What weighted values are multiplied by once every key is in peak [columns] (log2) and whole [columns]."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(peak, sink)
        share = tl.exp2(peak - top) / (whole * tl.exp2(peak - top) + tl.exp2(sink - top))
    else:
        share = 1.0 / tl.maximum(whole, 1e-30)  # of a column that saw no key it is 0
    return share
