"""What lies between the QKV projection and attention: norm of the heads, rotary embedding, store into the KV pool."""

import torch

from aiollm.kernels.ref.norm import norm
from aiollm.kernels.variants import Norm, Rotary


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
    """Return the rotated queries; write the rotated keys and the values into the pools in place.

    q [n, hq, d]; k, v [n, hkv, d] (views of one tensor are welcome); q_norm, k_norm: over the d dimensions of each head
    before the rotation, or None for none; positions [n] int64; k_pool, v_pool [slots + 1, hkv, d]; slots [n] int64. The
    result is [n, hq, d] in q's dtype. A normed head is rounded to that dtype before it is rotated in fp32. Dimensions
    from rot on stay as they are. Several tokens may name the last slot, which pads; its content is then arbitrary.
    """
    if q_norm is not None:
        q = norm(q, q_norm)
    if k_norm is not None:
        k = norm(k, k_norm)
    cos, sin = rotary.cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [n, 1, rot / 2] each
    k_pool[slots] = _rotate(k, cos, sin, rotary.interleaved).to(k_pool.dtype)
    v_pool[slots] = v.to(v_pool.dtype)
    return _rotate(q, cos, sin, rotary.interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn each pair (a, b) of the leading dimensions by its angle."""
    rot = 2 * cos.shape[-1]
    pairs = x[..., :rot].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pair = -1 if interleaved else -2  # the axis that tells a from b
    a, b = pairs.unbind(pair)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], pair).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., rot:]], dim=-1)
