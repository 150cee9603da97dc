"""What lies between the QKV projection and attention: norm of the heads, rotary embedding, store into the KV pool."""

import torch

from aiollm.kernels.ref.rms_norm import rms_norm


def rotary_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Return the rotated queries; write the rotated keys and the values into the pools in place.

    q [n, hq, d]; k, v [n, hkv, d] (views of one tensor are welcome); q_weight, k_weight [d]: RMS norm of each head
    before the rotation, or None for none; cos_sin [max_position, rot] float32, cosines in the first half of the columns
    and sines in the second; positions [n] int64; k_pool, v_pool [slots + 1, hkv, d]; slots [n] int64. The result is
    [n, hq, d] in q's dtype. Dimension i is paired with i + rot / 2 (Su et al., 2021, in the half-split layout); those
    from rot on stay as they are. Several tokens may name the last slot, which pads; its content is then arbitrary.
    """
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [n, 1, rot / 2] each
    k_pool[slots] = _rotate(k, cos, sin).to(k_pool.dtype)
    v_pool[slots] = v.to(v_pool.dtype)
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)
