"""Dense layers of a few rows on the tensor cores. The contracts are in ref/.

The weight is the left factor, y^T = W x^T: a tile of it is 64 or more rows high, which wgmma wants, and x, which is
narrow, is the right one. So the products cost little beside the reading of the weight, which is kept going as in
kernels/gemv.py. Where there are fewer tiles than multiprocessors, SPLIT programs share one: each sums a part of the
inputs, and the one that ends last adds the parts up in their order.
"""

import functools

import torch
import triton
import triton.language as tl

from aiollm.kernels import device
from aiollm.kernels.gated import activate
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.tuned import lookup
from aiollm.kernels.variants import Norm

NORMED = 16  # up to this many rows are normed inside: each program does it anew, on its way through x
TILES = 4096  # most tiles that are shared among programs: one counter each
CANDIDATES = [
    {"OUT": out, "IN": width, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    for out, width, warps, stages in (
        (64, 64, 4, 4), (64, 64, 4, 8), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3),
        (128, 64, 4, 4), (128, 128, 8, 3),
    )
    for split in (1, 2, 4)
]  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _few_rows(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, y_ptr, parts_ptr, counters_ptr,
    n, n_out, n_in, x_stride, weight_stride, eps,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    # Programs that share a tile of the weight lie next to each other: the second finds it in L2.
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here, used = outs < n_out, rows < n
    share = tl.cdiv(n_in, SPLIT * IN) * IN  # inputs of one part
    begin = tl.program_id(2) * share
    columns = tl.arange(0, IN)
    gate_ptrs = weight_ptr + tl.where(here, outs, n_out - 1).to(tl.int64)[:, None] * weight_stride
    gate_ptrs += begin + columns[None, :]
    up = tl.cast(n_out, tl.int64) * weight_stride  # how far behind the gate's weights
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + begin + columns[None, :]
    gate_sum = tl.zeros([OUT, ROWS], tl.float32)
    above_sum = tl.zeros([OUT, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    wait(PDL)
    for start in range(begin, tl.minimum(begin + share, n_in), IN):
        inside = start + columns < n_in
        gate = tl.load(gate_ptrs, EVEN | inside[None, :], 0.0)
        x = tl.load(x_ptrs, used[:, None] & (EVEN | inside[None, :]), 0.0)
        if norm_ptr is not None:
            exact = x.to(tl.float32)
            squares += tl.sum(exact * exact, 1)
            x = (exact * tl.load(norm_ptr + start + columns, inside, 0.0).to(tl.float32)[None, :]).to(gate.dtype)
        gate_sum = tl.dot(gate, x.T, gate_sum, input_precision="ieee")
        if ACTIVATION is not None:
            above = tl.load(gate_ptrs + up, EVEN | inside[None, :], 0.0)
            above_sum = tl.dot(above, x.T, above_sum, input_precision="ieee")
        gate_ptrs += IN
        x_ptrs += IN
    at = rows.to(tl.int64)[None, :] * n_out + outs[:, None]
    inside = used[None, :] & here[:, None]
    y = gate_sum
    if SPLIT > 1:
        part = n.to(tl.int64) * n_out
        tl.store(parts_ptr + tl.program_id(2) * part + at, y, inside)
        tl.debug_barrier()
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counters_ptr + tile, 1) != SPLIT - 1:
            return
        tl.store(counters_ptr + tile, 0)
        y = tl.load(parts_ptr + at, inside, 0.0)
        for other in tl.static_range(1, SPLIT):
            y += tl.load(parts_ptr + other * part + at, inside, 0.0)
    if norm_ptr is not None:
        scale = tl.rsqrt(squares / n_in + eps)[None, :]
        y *= scale
        above_sum *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + outs, here, 0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        if bias_ptr is not None:
            above_sum += tl.load(bias_ptr + n_out + outs, here, 0.0).to(tl.float32)[:, None]
        y = activate(y, ACTIVATION) * above_sum
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    before: Norm | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """x [n, in] -> linear's [n, out], or with an activation gated_linear's [n, out / 2].

    `before` is for at most NORMED rows, and has no centre.
    """
    n, n_in = x.shape
    n_out = len(weight) // (2 if activation else 1)
    y = torch.empty((n, n_out), dtype=x.dtype, device=x.device) if residual is None else residual
    rows = max(16, min(64, triton.next_power_of_2(n)))
    key: dict[str, int | str] = {
        "rows": str(rows),
        "out": n_out,
        "in": n_in,
        "dtype": str(x.dtype),
        "activation": str(activation),
    }
    config = dict(lookup("few_rows", key, _default(x, n_out, rows)))
    tiles = triton.cdiv(n, rows), triton.cdiv(n_out, config["OUT"])
    whole = activation is not None or before is not None or tiles[0] * tiles[1] > TILES
    split = config["SPLIT"] = 1 if whole else config["SPLIT"]
    parts = torch.empty((split, n, n_out), dtype=torch.float32, device=x.device) if split > 1 else None
    counters = _counters(x.device) if split > 1 else None
    _few_rows[(*tiles, split)](
        x, weight, bias, before.weight if before else None, residual, y, parts, counters, n, n_out, n_in, x.stride(0),
        weight.stride(0), before.eps if before else 0.0, ROWS=rows, EVEN=n_in % (split * config["IN"]) == 0,
        ACTIVATION=activation, **config, **pdl(x.device),
    )  # fmt: skip
    return y


def _default(x: torch.Tensor, n_out: int, rows: int) -> dict[str, int]:
    """Deep enough to keep reading going, and small enough for the card's shared memory."""
    split = 2 if n_out <= 64 * device.multiprocessors(x.device) // 2 else 1
    if device.shared_memory(x.device) < 200 << 10:
        return {"OUT": 64, "IN": 128 // x.element_size(), "SPLIT": split, "num_warps": 8, "num_stages": 3}
    if rows == 16 and split == 1:  # one H100, 8 rows of qkv: 20.6 us, with an IN of 128 34 us
        return {"OUT": 64, "IN": 512 // x.element_size(), "SPLIT": 1, "num_warps": 4, "num_stages": 3}
    return {"OUT": 64, "IN": 256 // x.element_size(), "SPLIT": split, "num_warps": 4, "num_stages": 4}


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Zeros, which each launch leaves as zeros; launches of one stream share them."""
    return torch.zeros(TILES, dtype=torch.int32, device=device)
