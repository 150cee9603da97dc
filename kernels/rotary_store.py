"""Norm of the heads, rotary embedding and the store into the KV pool in one pass; the contract is ref/rotary_store.py.

The heads of a token, q's, k's and v's, are one list, of which a program takes HEADS. It holds them as three tiles: `a`
and `b`, the first and the second dimension of each pair, and `c`, the rest, which is not rotated. Those of v pass
through unchanged. On an H100, bf16, heads of Qwen3-8B: 2.68 TB/s (89 % of a copy) for 4,096 tokens with scattered
slots, 1.0 us for one token within a graph.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from aiollm.kernels.norm import norm
from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.tuned import Key, lookup
from aiollm.kernels.variants import Norm, Rotary
from aiollm.kernels.workload import Case, Shape

CANDIDATES = [{"HEADS": h, "num_warps": w} for h in (4, 8, 16) for w in (1, 2, 4, 8)]


@triton.jit
def _load_pairs(ptrs, here, ROT: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of ROT values at ptrs [m, 1] -> first and second dimensions of the pairs, [m, PAIRS] each, padded by 0."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        a, b = tl.split(tl.reshape(tl.load(ptrs + at, here & (at < ROT), 0.0), [ptrs.shape[0], PAIRS, 2]))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        a = tl.load(ptrs + at, here & (at < ROT // 2), 0.0)
        b = tl.load(ptrs + (ROT // 2 + at), here & (at < ROT // 2), 0.0)
    return a, b


@triton.jit
def _store_pairs(ptrs, a, b, here, ROT: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        ab = tl.reshape(tl.join(a, b), [ptrs.shape[0], 2 * PAIRS])
        tl.store(ptrs + at, ab.to(ptrs.dtype.element_ty), here & (at < ROT))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        tl.store(ptrs + at, a.to(ptrs.dtype.element_ty), here & (at < ROT // 2))
        tl.store(ptrs + (ROT // 2 + at), b.to(ptrs.dtype.element_ty), here & (at < ROT // 2))


@triton.jit
def _normed(x, scale, weight, here):
    """Rounded to x's dtype; x where `here` is false."""
    return tl.where(here, (x.to(tl.float32) * scale * weight.to(tl.float32)).to(x.dtype), x)


@triton.jit
def _rotary_store(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_sin_ptr, positions_ptr, out_ptr, k_pool_ptr, v_pool_ptr,
    slots_ptr, q_stride, k_stride, v_stride, k_slot_stride, v_slot_stride, q_eps, k_eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    is_q = head < HQ
    is_k = (head >= HQ) & (head < HQ + HKV)
    is_v = (head >= HQ + HKV) & (head < HQ + 2 * HKV)
    present = is_q | is_k | is_v
    normed = (is_q & Q_NORM) | (is_k & K_NORM)
    pair = tl.arange(0, PAIRS)[None, :]
    if REST:
        rest = ROT + tl.arange(0, REST)[None, :]
    # Each head reads the weights anew, from L1: they then lie as the heads do, and no layout has to be converted.
    if Q_NORM or K_NORM:
        weights = tl.where(is_q, q_weight_ptr, k_weight_ptr)
        weight_a, weight_b = _load_pairs(weights, normed, ROT, PAIRS, INTERLEAVED)
        if REST:
            weight_c = tl.load(weights + rest, normed & (rest < D), 0.0)
    wait(PDL)
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    q_at, k_at, v_at = head * D, (head - HQ) * D, (head - HQ - HKV) * D
    source = tl.where(is_k, k_ptr + (token * k_stride + k_at), v_ptr + (token * v_stride + v_at))
    source = tl.where(is_q, q_ptr + (token * q_stride + q_at), source)
    a, b = _load_pairs(source, present, ROT, PAIRS, INTERLEAVED)
    if REST:
        c = tl.load(source + rest, present & (rest < D), 0.0)
    angles = tl.broadcast_to(cos_sin_ptr + position * ROT + pair, [HEADS, PAIRS])
    cos = tl.load(angles, pair < ROT // 2, 0.0)
    sin = tl.load(angles + ROT // 2, pair < ROT // 2, 0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if Q_NORM or K_NORM:
        squares = tl.sum(x * x + y * y, 1, keep_dims=True)
        if REST:
            squares += tl.sum(c.to(tl.float32) * c.to(tl.float32), 1, keep_dims=True)
        scale = tl.rsqrt(squares / D + tl.where(is_q, q_eps, k_eps))
        x = _normed(a, scale, weight_a, normed).to(tl.float32)
        y = _normed(b, scale, weight_b, normed).to(tl.float32)
        if REST:
            c = _normed(c, scale, weight_c, normed)
    turned_a = tl.where(is_v, a, (x * cos - y * sin).to(a.dtype))
    turned_b = tl.where(is_v, b, (y * cos + x * sin).to(b.dtype))
    to_q = out_ptr + (token * (HQ * D) + q_at)
    to_k = k_pool_ptr + (slot * k_slot_stride + k_at)
    to_v = v_pool_ptr + (slot * v_slot_stride + v_at)
    _store_pairs(to_q, turned_a, turned_b, is_q, ROT, PAIRS, INTERLEAVED)
    _store_pairs(to_k, turned_a, turned_b, is_k, ROT, PAIRS, INTERLEAVED)
    _store_pairs(to_v, turned_a, turned_b, is_v, ROT, PAIRS, INTERLEAVED)
    if REST:
        tl.store(to_q + rest, c, is_q & (rest < D))
        tl.store(to_k + rest, c.to(k_pool_ptr.dtype.element_ty), is_k & (rest < D))
        tl.store(to_v + rest, c.to(v_pool_ptr.dtype.element_ty), is_v & (rest < D))


def rotary_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
    rotary: Rotary,
    positions: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Return the rotated queries [n, hq, d]; write the rotated keys and the values into the pools in place.

    The heads of a token or slot lie one after another. Layer norms of heads, which are rare, take passes of their own.
    """
    if q_norm is not None and not _is_plain(q_norm):
        q, q_norm = norm(q, q_norm), None
    if k_norm is not None and not _is_plain(k_norm):
        k, k_norm = norm(k, k_norm), None
    (n, hq, d), hkv, rot = q.shape, k.shape[1], rotary.cos_sin.shape[1]
    if any(t.stride()[1:] != (d, 1) for t in (q, k, v, k_pool, v_pool)):
        raise ValueError("the rotary_store kernel wants the heads of a token or slot one after another")
    out = torch.empty((n, hq, d), dtype=q.dtype, device=q.device)
    if not n:
        return out
    q_by = q_norm or k_norm or Norm(q, 0.0)  # where there is no norm, its weight is never read
    k_by = k_norm or q_by
    pairs, rest = _power_of_2(rot // 2), _power_of_2(d - rot)
    heads = hq + 2 * hkv
    key: Key = {"tokens": _power_of_2(n), "heads": heads, "head_dim": str(d), "dtype": str(q.dtype)}
    config = lookup("rotary_store", key, _default(n, 2 * pairs + rest))
    _rotary_store[(n, -(-heads // config["HEADS"]))](
        q, k, v, q_by.weight, k_by.weight, rotary.cos_sin, positions, out, k_pool, v_pool,
        slots, q.stride(0), k.stride(0), v.stride(0), k_pool.stride(0), v_pool.stride(0), q_by.eps, k_by.eps,
        HQ=hq, HKV=hkv, D=d, ROT=rot, PAIRS=pairs, REST=rest, INTERLEAVED=rotary.interleaved,
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, **config, **pdl(q.device),
    )  # fmt: skip
    return out


def _power_of_2(n: int) -> int:
    """The least that is not below n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _is_plain(by: Norm) -> bool:
    return by.bias is None and not by.centered


def _default(n: int, width: int) -> dict[str, int]:
    """Eight heads of `width` with their padding; of each tile a thread loads 8 bytes, or 16 where tokens are many."""
    each = 8 if n <= 64 else 16
    return {"HEADS": 8, "num_warps": max(1, 8 * _power_of_2(width) // (32 * each))}


def cases(shape: Shape) -> Iterator[Case]:
    """Views of one qkv tensor, with and without norms, at decode and prefill sizes; slots scattered."""
    hq, hkv, d = shape.heads, shape.kv_heads, shape.head_dim
    for n in (1, 64, 256, 1024, 4096, 8192):

        def make(device: torch.device, n: int = n, normed: bool = True) -> tuple[Any, ...]:
            qkv = torch.randn(n, hq + 2 * hkv, d, device=device, dtype=shape.dtype)
            q_norm, k_norm = (Norm(torch.randn(d, device=device, dtype=shape.dtype), 1e-6) for _ in range(2))
            angles = torch.arange(8192, device=device)[:, None] * torch.rand(d // 2, device=device)
            rotary = Rotary(torch.cat([angles.cos(), angles.sin()], 1))
            positions = torch.randint(8192, (n,), device=device)
            pools = torch.zeros(2, 16385, hkv, d, device=device, dtype=shape.dtype)
            slots = torch.randperm(16384, device=device)[:n]
            norms = (q_norm, k_norm) if normed else (None, None)
            return *qkv.split([hq, hkv, hkv], 1), *norms, rotary, positions, *pools.unbind(), slots

        moved = n * (hq + 2 * hkv) * d * shape.dtype.itemsize
        yield Case("rotary_store", f"{n} tokens", make, bytes=2 * moved + n * (4 * d + 16))
        if n == 4096:
            plain = partial(make, normed=False)
            yield Case("rotary_store", f"{n} tokens, no norms", plain, bytes=2 * moved + n * (4 * d + 16))
