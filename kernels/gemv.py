"""Dense layers of one row: a weight is read once and multiplied on the way. The contracts are in ref/.

Reading is all there is to do, so nothing may pause it: a program loads its first tile of the weight before it waits
for the kernel that makes x, and every later one a turn ahead. (To ask L2 for more of it meanwhile, by bulk prefetches
of 32 and 64 KiB, made a step of Qwen3-8B 3 to 13 % slower.) One H100, Qwen3-8B's layers in a graph: 2.6 to 3.2 TB/s
with norm, residual and activation inside, cuBLAS 2.0 to 2.8 without.
"""

import torch
import triton
import triton.language as tl

from aiollm.kernels.gated import activate
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.tuned import Key, lookup
from aiollm.kernels.variants import Norm

CANDIDATES = [
    {"OUT": out, "IN": width, "num_warps": warps}
    for out, width, warps in (
        (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (4, 2048, 8), (8, 512, 4), (8, 1024, 8), (16, 256, 4),
    )
]  # fmt: skip


@triton.jit
def _gemv(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, y_ptr, n_out, n_in, weight_stride, eps,
    OUT: tl.constexpr, IN: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    here = outs < n_out
    columns = tl.arange(0, IN)
    gate_ptrs = weight_ptr + tl.where(here, outs, n_out - 1).to(tl.int64)[:, None] * weight_stride + columns[None, :]
    up = tl.cast(n_out, tl.int64) * weight_stride  # how far behind the gate's weights
    # The tile of the next turn is always on its way.
    inside = columns[None, :] < n_in
    gate = tl.load(gate_ptrs, inside, 0.0, eviction_policy="evict_first")
    gate_sum = tl.zeros([OUT, IN], tl.float32)
    if ACTIVATION is not None:
        above = tl.load(gate_ptrs + up, inside, 0.0, eviction_policy="evict_first")
        above_sum = tl.zeros([OUT, IN], tl.float32)
    squares = tl.zeros([IN], tl.float32)
    wait(PDL)
    for start in range(0, n_in, IN):
        known = start + columns < n_in
        x = tl.load(x_ptr + start + columns, known, 0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            x *= tl.load(norm_ptr + start + columns, known, 0.0).to(tl.float32)
        gate_ptrs += IN
        inside = start + IN + columns[None, :] < n_in
        next_gate = tl.load(gate_ptrs, inside, 0.0, eviction_policy="evict_first")
        gate_sum += gate.to(tl.float32) * x[None, :]
        gate = next_gate
        if ACTIVATION is not None:
            next_above = tl.load(gate_ptrs + up, inside, 0.0, eviction_policy="evict_first")
            above_sum += above.to(tl.float32) * x[None, :]
            above = next_above
    y = tl.sum(gate_sum, 1)
    scale = 1.0
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / n_in + eps)
        y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + outs, here, 0.0).to(tl.float32)
    if ACTIVATION is not None:
        z = tl.sum(above_sum, 1) * scale
        if bias_ptr is not None:
            z += tl.load(bias_ptr + n_out + outs, here, 0.0).to(tl.float32)
        y = activate(y, ACTIVATION) * z
    if residual_ptr is not None:
        y += tl.load(residual_ptr + outs, here, 0.0).to(tl.float32)
    tl.store(y_ptr + outs, y.to(y_ptr.dtype.element_ty), here)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    before: Norm | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """x [1, in] -> linear's [1, out], or with an activation gated_linear's [1, out / 2]. `before` has no centre."""
    n_out, n_in = len(weight) // (2 if activation else 1), weight.shape[1]
    y = torch.empty((1, n_out), dtype=x.dtype, device=x.device) if residual is None else residual
    key: Key = {"out": n_out, "in": n_in, "dtype": str(x.dtype), "activation": str(activation)}
    config = lookup("gemv", key, {"OUT": 8, "IN": 512, "num_warps": 4})
    _gemv[(triton.cdiv(n_out, config["OUT"]),)](
        x, weight, bias, before.weight if before else None, residual, y, n_out, n_in, weight.stride(0),
        before.eps if before else 0.0, ACTIVATION=activation, **config, **pdl(x.device),
    )  # fmt: skip
    return y
