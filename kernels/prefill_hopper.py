"""prefill_attention on Hopper: one warp group loads, two compute, as in FlashAttention-3 (Shah et al., 2024).

It is written in Gluon, where one says what each warp group does. A program stays on its multiprocessor and takes one
item after another, a query head of a tile of new tokens, from a counter. The loading warps gather keys and values slot
by slot. Each computing group has 64 of the queries: while it turns scores into weights, the tensor cores add up its
values of the block before; and the groups take turns at giving the tensor cores work.

TFLOP/s on an H100, bf16, 32 query and 8 KV heads of width 128, slots at random: 558 for 1 x 16,384 tokens (566 where
the slots are one run), 546 for 2 x 8,192, 529 for 4 x 4,096; prefill_attention.py's own kernel has 395 for the first
and 384 for the last. The loading warps must not spill, as a slot number that is spilled is waited for (506 with five of
them); constant strides of the pools leave them the registers.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from aiollm.kernels import device as devices
from aiollm.kernels.batch import Batch
from aiollm.kernels.variants import Scoring

TILE = gl.constexpr(128)  # new tokens
HALF = gl.constexpr(64)  # of those a computing group's: the rows of a wgmma
THREADS = gl.constexpr(128)  # of a warp group
REGISTERS = gl.constexpr((216, 72))  # of a computing and of a loading thread: 2 * 216 + 72 = 3 * 168 is all there is
HIDDEN = gl.constexpr(-1e30)  # finite, as a row may see no key of the first blocks, and -inf less -inf is NaN
LOG2E = gl.constexpr(1.4426950408889634)

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # the name in Triton 3.6


def fits(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor) -> bool:
    """Whether `prefill_hopper` computes this: 16-bit numbers on Hopper, in rows that are copied 16 bytes at a time."""
    places = [place for x in (q, k_pool, v_pool) for place in (x.data_ptr(), *x.stride()[:2])]
    return (
        q.device.type != "cpu"
        and devices.capability(q.device) == (9, 0)
        and q.dtype == k_pool.dtype == v_pool.dtype != torch.float32
        and 32 < q.shape[2] <= 256
        and all(place % 16 == 0 for place in places)
    )


def prefill_hopper(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    batch: Batch,
    scoring: Scoring,
    out: torch.Tensor,
    share: torch.Tensor | None,
) -> None:
    """As prefill_attention.prefill_attention, where `fits` says so."""
    heads, width = q.shape[1:]
    kv_heads = k_pool.shape[1]
    tiles, counters = batch.plan.prefill
    wide = width > 128
    _attend[(devices.multiprocessors(q.device),)](
        q, k_pool, v_pool, out, tiles, counters, share, batch.slot_table, scoring.slopes, scoring.sinks,
        batch.slot_table.stride(0), scoring.scale, scoring.window, scoring.softcap,
        Q_STRIDES=q.stride()[:2], K_STRIDES=k_pool.stride()[:2], V_STRIDES=v_pool.stride()[:2],
        OUT_STRIDES=out.stride()[:2], KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        WIDTH=width, D=triton.next_power_of_2(width), WINDOW=scoring.window > 0, SOFTCAP=scoring.softcap > 0,
        BLOCK_N=64 if wide else 128, STAGES=2, Q_STAGES=1 if wide else 2, num_warps=4,
    )  # fmt: skip


@gluon.jit
def _place(turn, STAGES: gl.constexpr):
    """Which of several buffers a turn uses, and the parity of that buffer's barriers."""
    return turn % STAGES, turn // STAGES & 1


@gluon.constexpr_function
def _by_rows(width):
    """Eight numbers, 16 bytes, for each thread of a warp group; neighbours in a row of `width` numbers."""
    lanes = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _item(index, tiles, count, window, GROUP: gl.constexpr, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of a tile first packed token, number of tokens, row, position of the first; lowest key, blocks of keys; heads.

    The query heads of a KV head come one after the other, and all tiles of a KV head before those of the next: its
    keys stay in L2.
    """
    entry = tiles + index // GROUP % count * 4
    first = gl.load(entry)
    new = gl.minimum(gl.load(entry + 1) - first, TILE)
    start = gl.load(entry + 3)
    lowest = 0
    if WINDOW:
        lowest = gl.maximum(start - window + 1, 0)
    low = lowest // BLOCK_N
    high = gl.cdiv(start + new, BLOCK_N)
    kv_head = index // GROUP // count
    return first, new, gl.load(entry + 2), start, lowest, low, high, kv_head, kv_head * GROUP + index % GROUP


@gluon.jit
def _load_rows(source, place, smem, barrier, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Copy the rows at the offsets `place` [n] from `source`; the barrier falls when they are there.

    No proxy fence follows, as none does where Triton itself feeds wgmma by cp.async; with one: 549 for the 566 above.
    """
    D: gl.constexpr = smem.shape[1]
    column = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    pointer = source + place[:, None] + column[None, :]
    if WIDTH == D:
        async_load(smem, pointer)
    else:
        async_load(smem, pointer, mask=(column < WIDTH)[None, :])
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def _produce(
    q, k_pool, v_pool, slot_table, table_row, tiles, counters, programs, items, window, buffers, barriers,
    Q_STRIDES: gl.constexpr, K_STRIDES: gl.constexpr, V_STRIDES: gl.constexpr,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The loading warps: take an item, tell the others, load its queries, keys and values."""
    item_smem, q_smem, k_smem, v_smem = buffers
    item_full, q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    Q_STAGES: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    LAYOUT: gl.constexpr = _by_rows(k_smem.shape[2])
    m_at = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    n_at = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    count = gl.load(counters)
    tile = 0
    turn = 0
    index = gl.atomic_add(counters + 1, 1, sem="relaxed")
    while index < items:
        first, new, row, start, lowest, low, high, kv_head, head = _item(
            index, tiles, count, window, GROUP, WINDOW, BLOCK_N
        )  # fmt: skip
        slots = slot_table + row.to(gl.int64) * table_row
        keys = k_pool + kv_head * K_STRIDES[1]
        values = v_pool + kv_head * V_STRIDES[1]
        at = (high - 1) * BLOCK_N
        # Outside [lowest, start + new) the table may hold what is no slot; what a masked key reads must be finite.
        slot = gl.load(slots + gl.minimum(gl.maximum(at + n_at, lowest), start + new - 1))

        _give(index, tile, item_smem, item_full, q_empty, Q_STAGES)
        q_stage = tile % Q_STAGES
        token = (first + gl.minimum(m_at, new - 1)).to(gl.int64)
        queries = q + head * Q_STRIDES[1]
        _load_rows(queries, token * Q_STRIDES[0], q_smem.index(q_stage), q_full.index(q_stage), WIDTH, LAYOUT)
        tile += 1
        index = gl.atomic_add(counters + 1, 1, sem="relaxed")
        for _ in range(low, high):
            at -= BLOCK_N
            following = gl.load(slots + gl.maximum(at + n_at, lowest))
            place = slot.to(gl.int64)
            stage, phase = _place(turn, STAGES)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _load_rows(keys, place * K_STRIDES[0], k_smem.index(stage), k_full.index(stage), WIDTH, LAYOUT)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _load_rows(values, place * V_STRIDES[0], v_smem.index(stage), v_full.index(stage), WIDTH, LAYOUT)
            slot = following
            turn += 1
    _give(index, tile, item_smem, item_full, q_empty, Q_STAGES)
    if gl.atomic_add(counters + 2, 1) == programs - 1:  # no program will ask for another item
        gl.store(counters + 1, 0)
        gl.store(counters + 2, 0)


@gluon.jit
def _give(index, tile, item_smem, item_full, q_empty, Q_STAGES: gl.constexpr):
    """Wait until the place for the next tile's queries is free, and put the item beside it."""
    stage, phase = _place(tile, Q_STAGES)
    mbarrier.wait(q_empty.index(stage), phase ^ 1)
    item_smem.index(stage).store(gl.full([1], index, gl.int32, layout=gl.BlockedLayout([1], [32], [4], [0])))
    mbarrier.arrive(item_full.index(stage), count=1)


@gluon.jit
def _take(tile, item_smem, item_full, Q_STAGES: gl.constexpr):
    """The item that the loading warps gave."""
    stage, phase = _place(tile, Q_STAGES)
    mbarrier.wait(item_full.index(stage), phase)
    return gl.max(item_smem.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _consume(
    PART: gl.constexpr, out, tiles, counters, items, slopes, sinks, scale, window, softcap, buffers, barriers, order,
    OUT_STRIDES: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The computing warps: of each tile the first 64 queries (PART 0) or the rest (1), over keys from the last back."""
    item_smem, q_smem, k_smem, v_smem = buffers
    item_full, q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    Q_STAGES: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORE: gl.constexpr = _by_rows(D)
    m_at = gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    n_at = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
    zeros = gl.zeros([HALF, BLOCK_N], gl.float32, layout=SCORES)
    # Scores in units of log 2; with a soft cap, `scale` is what the tangent is taken of.
    if SOFTCAP:
        scale = scale / softcap * (2 * LOG2E)
        softcap = softcap * LOG2E
    else:
        scale = scale * LOG2E
    count = gl.load(counters)
    tile = 0
    turn = 0
    index = _take(tile, item_smem, item_full, Q_STAGES)
    while index < items:
        first, new, _row, start, _lowest, low, high, _kv_head, head = _item(
            index, tiles, count, window, GROUP, WINDOW, BLOCK_N
        )  # fmt: skip
        start += PART * HALF
        position = start + m_at
        slope = 0.0
        if slopes is not None:
            slope = gl.load(slopes + head) * LOG2E
        top = gl.full([HALF], HIDDEN, gl.float32, layout=gl.SliceLayout(1, SCORES))
        if sinks is not None:
            top = gl.maximum(top, gl.load(sinks + head) * LOG2E)
        acc = gl.zeros([HALF, D], gl.float32, layout=OUT)

        # Blocks full_low to full_high need no mask. The last one, which comes first, has one always.
        full_high = gl.minimum((start + 1) // BLOCK_N, high - 1)
        full_low = low
        if WINDOW:
            full_low = gl.minimum(gl.maximum(gl.cdiv(start + HALF - window, BLOCK_N), low), full_high)
        at = (high - 1) * BLOCK_N
        last = turn + high - 1 - low

        q_stage, q_phase = _place(tile, Q_STAGES)
        queries = q_smem.index(q_stage).slice(PART * HALF, HALF)
        mbarrier.wait(q_full.index(q_stage), q_phase)
        stage, phase = _place(turn, STAGES)
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.wait(order.index(PART), (turn & 1) ^ (1 - PART))
        keys = k_smem.index(stage).permute((1, 0))
        scores = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
        mbarrier.arrive(order.index(1 - PART), count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, total, top, factor = _softmax(
            scores, top, at + n_at, position, scale, window, softcap, slope, slopes is not None, WINDOW, SOFTCAP, True
        )  # fmt: skip
        turn += 1
        _await(turn, last, k_full, v_full, STAGES)
        operand = gl.convert_layout(weights.to(k_smem.dtype), WEIGHTS)

        for span in gl.static_range(2 + WINDOW):  # masked by position; not masked; masked by the window
            steps = high - 1 - full_high
            if span == 1:
                steps = full_high - full_low
            if span == 2:
                steps = full_low - low
            for _ in range(steps):
                at -= BLOCK_N
                stage = turn % STAGES
                before = (turn - 1) % STAGES
                mbarrier.wait(order.index(PART), (turn & 1) ^ (1 - PART))
                keys = k_smem.index(stage).permute((1, 0))
                scores = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
                acc = warpgroup_mma(operand, v_smem.index(before), acc, is_async=True)
                mbarrier.arrive(order.index(1 - PART), count=1)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, sums, top, factor = _softmax(
                    scores, top, at + n_at, position, scale, window, softcap, slope, slopes is not None, WINDOW,
                    SOFTCAP, span != 1,
                )  # fmt: skip
                total = total * _for_rows(factor, total) + sums
                turn += 1
                # Waiting here keeps ptxas from moving the wait for `acc` up before the softmax: they shall overlap.
                _await(turn, last, k_full, v_full, STAGES)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                mbarrier.arrive(v_empty.index(before), count=1)
                operand = gl.convert_layout(weights.to(k_smem.dtype), WEIGHTS)
                acc = acc * _for_rows(factor, acc)
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        tile += 1

        before = (turn - 1) % STAGES
        acc = warpgroup_mma(operand, v_smem.index(before), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)

        whole = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES))
        if sinks is not None:
            whole += gl.exp2(gl.load(sinks + head) * LOG2E - top)
        result = gl.convert_layout((acc * _for_rows(1.0 / whole, acc)).to(out.dtype.element_ty), STORE)
        row_at = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, STORE))
        d_at = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
        place = out + (first + row_at).to(gl.int64)[:, None] * OUT_STRIDES[0] + head * OUT_STRIDES[1] + d_at[None, :]
        gl.store(place, result, mask=(row_at < new)[:, None] & (d_at < WIDTH)[None, :])
        index = _take(tile, item_smem, item_full, Q_STAGES)


@gluon.jit
def _await(turn, last, k_full, v_full, STAGES: gl.constexpr):
    """Until the values of the turn before are there, and the keys of this one unless it is past the last."""
    stage, phase = _place(turn - 1, STAGES)
    mbarrier.wait(v_full.index(stage), phase)
    stage, phase = _place(turn, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=turn <= last)


@gluon.jit
def _softmax(
    scores, top, at, position, scale, window, softcap, slope,
    ALIBI: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Weights, relative to the highest score of each row; their sums; that score; by what earlier weights shrink.

    There are four sums for each row, one for each thread that holds a part of it.
    """
    rescale = scale
    if SOFTCAP:
        scores = (1.0 - 2.0 / (1.0 + gl.exp2(scores * scale))) * softcap
        rescale = 1.0
    if ALIBI:
        scores = scores * rescale - slope * (position[:, None] - at[None, :]).to(gl.float32)
        rescale = 1.0
    if MASKED:
        visible = at[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (at[None, :] > position[:, None] - window)
        scores = gl.where(visible, scores * rescale, HIDDEN)
        rescale = 1.0
    new_top = gl.maximum(top, gl.max(scores, 1) * rescale)
    weights = gl.exp2(scores * rescale - new_top[:, None])
    sums = gl.sum(gl.sum(gl.reshape(weights, [HALF, scores.shape[1] // 8, 4, 2]), 3), 1)
    return weights, sums, new_top, gl.exp2(top - new_top)


@gluon.jit
def _for_rows(vector, matrix):
    """A number for each row of a matrix, laid out to be combined with it."""
    return gl.convert_layout(vector, gl.SliceLayout(1, matrix.type.layout))[:, None]


@gluon.jit
def _attend(
    q, k_pool, v_pool, out, tiles, counters, share, slot_table, slopes, sinks, table_row, scale, window, softcap,
    Q_STRIDES: gl.constexpr, K_STRIDES: gl.constexpr, V_STRIDES: gl.constexpr, OUT_STRIDES: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    programs = gl.num_programs(0)
    if share is not None:
        # Registers let one program on a multiprocessor, and no other kernel beside it: what begins now gets the others.
        gdc_launch_dependents()
        programs = gl.load(share)
        if gl.program_id(0) >= programs:
            return
    dtype: gl.constexpr = q.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    item_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES, TILE, D], q_layout)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    item_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(q_full.index(i), count=THREADS)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=THREADS)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=THREADS)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    items = gl.load(counters) * (KV_HEADS * GROUP)
    buffers = (item_smem, q_smem, k_smem, v_smem)
    barriers = (item_full, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (
                0, out, tiles, counters, items, slopes, sinks, scale, window, softcap, buffers, barriers, order,
                OUT_STRIDES, GROUP, WIDTH, WINDOW, SOFTCAP,
            )),
            (_consume, (
                1, out, tiles, counters, items, slopes, sinks, scale, window, softcap, buffers, barriers, order,
                OUT_STRIDES, GROUP, WIDTH, WINDOW, SOFTCAP,
            )),
            (_produce, (
                q, k_pool, v_pool, slot_table, table_row, tiles, counters, programs, items, window, buffers,
                barriers, Q_STRIDES, K_STRIDES, V_STRIDES, GROUP, WIDTH, WINDOW,
            )),
        ],
        [4, 4],
        REGISTERS,
    )  # fmt: skip
