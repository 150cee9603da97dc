"""What a step's Triton attention lays out on the device, once, for all of its layers.

For sequences that bring one token: all tiles of all of them, laid end to end, are cut into equal runs, one for each
worker of a fixed grid, as in Stream-K (Osama et al., 2023). So one launch serves any mix of lengths, and a graph does
not depend on them.

Where prompts are computed beside them, on multiprocessors of their own, those are shared out as the work is: reading
keys takes all of the memory's time and few multiprocessors, prompts take what these compute.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aiollm.kernels.batch import Batch
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.prefill_attention import Prefill, plan_prefill

SEQUENCES = 1024  # that a program reads at once
WORKERS = 8  # that a program lays out: more programs, each with shorter sums
RECORD = tl.constexpr(8)  # integers of a worker
EDGE = tl.constexpr(128)  # of a block of pairs: queries, and keys
LEAST = tl.constexpr(128)  # tokens of a piece, at least, where a sequence has more: adding up many takes longer


class Layout(NamedTuple):
    """What a plan for one-token sequences depends on besides the batch."""

    window: int  # as in Scoring
    block: int  # tokens of a tile
    workers: int
    head_blocks: int  # each of them is computed by all workers
    columns: int  # query heads of a head block
    width: int  # of a head
    processors: int = 0  # multiprocessors that prompts may be given a share of; 0: they are computed before
    pairs: int = 0  # tokens that are read while one multiprocessor attends to a block of a prompt, by one that reads


class Decode(NamedTuple):
    """Which worker computes what, and scratch memory for the sequences that are cut.

    An entry is a sequence of one new token; entries are in the order of the batch.
    """

    workers: torch.Tensor  # [workers, 8] int32: tiles of each and in all, first entry; of that one the first tile,
    #                        the tile after its last, row, length, packed token
    entries: torch.Tensor  # [4, n + 2] int32: of each entry the tile after its last, row, length, packed token
    arrived: torch.Tensor  # [n, head_blocks] int32: how many pieces of an entry are there; 0 between launches
    pieces: torch.Tensor  # [2 * workers, head_blocks, columns, width] float32: weighted values
    sums: torch.Tensor  # [2 * workers, head_blocks, columns, 2] float32: highest score (log2), sum of weights
    prompts: torch.Tensor  # [1] int32: multiprocessors that the sequences of more new tokens have to themselves; 0
    #                        where they are computed before


class Plan(NamedTuple):
    """The type of `batch.plan`."""

    prefill: Prefill | None  # None where no sequence brings more than one token
    decode: dict[Layout, Decode]  # filled by the first layer of each layout: models mix layers with and without window


def plan(batch: Batch, kv_heads: int) -> Batch:
    """The batch with a Plan; the contract is ref/plan.py."""
    if batch.plan is not None:  # slots make no difference
        return batch
    return batch._replace(plan=Plan(plan_prefill(batch) if batch.max_new > 1 else None, {}))


def plan_decode(batch: Batch, layout: Layout) -> Decode:
    """Lay out the batch's sequences of one new token, of which there is room for `len(batch.rows)`. One launch."""
    n, device = len(batch.rows), batch.lengths.device
    pieces = (2 * layout.workers, layout.head_blocks, layout.columns)
    laid = Decode(
        workers=torch.empty((layout.workers, RECORD.value), dtype=torch.int32, device=device),
        entries=torch.empty((4, n + 2), dtype=torch.int32, device=device),
        arrived=torch.empty((n, layout.head_blocks), dtype=torch.int32, device=device),
        pieces=torch.empty((*pieces, layout.width), dtype=torch.float32, device=device),
        sums=torch.empty((*pieces, 2), dtype=torch.float32, device=device),
        prompts=torch.empty(1, dtype=torch.int32, device=device),
    )
    _plan_decode[(triton.cdiv(layout.workers, WORKERS),)](
        batch.rows, batch.starts, batch.lengths, laid.workers, laid.entries, laid.arrived, laid.prompts,
        n, layout.workers, layout.window, layout.head_blocks, layout.processors, layout.pairs,
        BLOCK=layout.block, N=min(SEQUENCES, triton.next_power_of_2(n)), W=WORKERS, num_warps=8, **pdl(device),
    )  # fmt: skip
    return laid


@triton.jit(do_not_specialize=["n"])
def _plan_decode(
    rows, starts, lengths, workers, entries, arrived, prompts, n, count, window, head_blocks, processors, pairs,
    BLOCK: tl.constexpr, N: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program reads all lengths, and lays out W of the `count` workers; the first one the entries too."""
    trigger(PDL)
    wait(PDL)
    total = 0
    longest = 1
    blocks = 0.0
    for base in range(0, n, N):
        at = base + tl.arange(0, N)
        tiles, _, _ = _tiles(starts, lengths, at, n, window, BLOCK)
        total += tl.sum(tiles)
        longest = tl.maximum(longest, tl.max(tiles))
        if processors > 0:
            blocks += tl.sum(_blocks(starts, lengths, at, n, window))
    share = 0
    others = count
    if processors > 0:
        work = blocks * pairs
        share = tl.ceil(processors * work / tl.maximum(work + (total * BLOCK).to(tl.float32), 1.0)).to(tl.int32)
        if count * (processors - share) < processors:  # not one worker is left: they come when the prompts are done
            share = processors
        else:
            others = count * (processors - share) // processors
            share = processors - tl.cdiv(others * processors, count)  # what is too little for one more goes back
    if tl.program_id(0) == 0:
        tl.store(prompts, share)
    per = tl.maximum(tl.cdiv(total, others), tl.minimum(longest, LEAST // BLOCK))
    # Sequences of one length are not cut where that idles few workers: the others share the memory that those leave.
    whole = tl.cdiv(per, longest) * longest
    per = tl.where(whole * 8 <= per * 9, whole, per)
    worker = tl.program_id(0) * W + tl.arange(0, W)
    begin = worker * per  # the first tile of each
    where = tl.zeros([W], tl.int32)  # the sequence that it is of
    number = tl.zeros([W], tl.int32)  # that one's entry
    first = tl.zeros([W], tl.int32)  # and first tile
    tiles_before = 0
    entries_before = 0
    for base in range(0, n, N):
        at = base + tl.arange(0, N)
        tiles, length, token = _tiles(starts, lengths, at, n, window, BLOCK)
        row = tl.load(rows + at, mask=at < n, other=0).to(tl.int32)
        is_entry = (tiles > 0).to(tl.int32)
        entry = entries_before + tl.cumsum(is_entry) - 1
        end = tiles_before + tl.cumsum(tiles)
        own = ((end - tiles)[:, None] <= begin[None, :]) & (begin[None, :] < end[:, None])
        where += tl.sum(tl.where(own, at[:, None], 0), 0)
        number += tl.sum(tl.where(own, entry[:, None], 0), 0)
        first += tl.sum(tl.where(own, (end - tiles)[:, None], 0), 0)
        if tl.program_id(0) == 0:
            tl.store(entries + entry, end, mask=tiles > 0)
            tl.store(entries + (n + 2) + entry, row, mask=tiles > 0)
            tl.store(entries + 2 * (n + 2) + entry, length, mask=tiles > 0)
            tl.store(entries + 3 * (n + 2) + entry, token, mask=tiles > 0)
            for block in range(head_blocks):
                tl.store(arrived + at * head_blocks + block, 0, mask=at < n)
        tiles_before += tl.sum(tiles)
        entries_before += tl.sum(is_entry)
    tiles, length, token = _tiles(starts, lengths, where, n, window, BLOCK)
    row = tl.load(rows + where).to(tl.int32)
    record = workers + worker * RECORD
    here = worker < count
    tl.store(record, tl.zeros([W], tl.int32) + per, mask=here)
    tl.store(record + 1, tl.zeros([W], tl.int32) + total, mask=here)
    tl.store(record + 2, number, mask=here)
    tl.store(record + 3, first, mask=here)
    tl.store(record + 4, first + tiles, mask=here)
    tl.store(record + 5, row, mask=here)
    tl.store(record + 6, length, mask=here)
    tl.store(record + 7, token, mask=here)


@triton.jit
def _tiles(starts, lengths, at, n, window, BLOCK: tl.constexpr):
    """Tiles, lengths and first tokens of the sequences `at`; no tiles where there is not exactly one new token."""
    here = at < n
    begin = tl.load(starts + at, mask=here, other=0)
    end = tl.load(starts + at + 1, mask=here, other=0)
    length = tl.load(lengths + at, mask=here, other=0)
    seen = length
    if window > 0:
        seen = tl.minimum(length, window)
    return tl.where(end - begin == 1, (seen + BLOCK - 1) // BLOCK, 0), length, begin


@triton.jit
def _blocks(starts, lengths, at, n, window):
    """Blocks of EDGE queries and as many keys that the sequences `at` of several new tokens have, about."""
    here = at < n
    new = tl.load(starts + at + 1, mask=here, other=0) - tl.load(starts + at, mask=here, other=0)
    keys = tl.load(lengths + at, mask=here, other=0) - new // 2
    if window > 0:
        keys = tl.minimum(keys, window)
    blocks = tl.cdiv(new, EDGE).to(tl.float32) * (tl.cdiv(keys, EDGE) + 1).to(tl.float32)
    return tl.where(new > 1, blocks, 0.0)
