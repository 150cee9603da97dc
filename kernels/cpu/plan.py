"""Where the keys and values of a step's sequences lie, for cpu/attention.py: worked out once, read by every layer.

One-token sequences are computed together, padded, in groups of bounded size and similar length; longer ones alone.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch

from aiollm.kernels.batch import Batch

GATHERED = 1 << 16  # padded keys gathered at once, over all KV heads: 16 MiB of fp32 at a width of 64


class Prefill(NamedTuple):
    """A sequence of several new tokens: begin to end on the packed axis."""

    begin: int
    end: int
    slots: torch.Tensor  # [length]


class Decodes(NamedTuple):
    """n sequences of one new token, padded to one length."""

    tokens: torch.Tensor  # [n] int64 on the packed axis
    lengths: torch.Tensor  # [n] int64
    places: torch.Tensor  # [n * hkv * length] int64: rows of the pools as [(slots + 1) * hkv, d]
    hidden: torch.Tensor  # [n * hkv, 1, length] float32: -inf where there is padding, 0 elsewhere


class Plan(NamedTuple):
    prefills: list[Prefill]
    decodes: list[Decodes]
    windowed: dict[int, list[Decodes]]  # by window; filled by the first layer that has it

    def seen(self, window: int) -> list[Decodes]:
        """`decodes` without the positions that lie before a window; 0 is none."""
        if not window:
            return self.decodes
        if window not in self.windowed:
            self.windowed[window] = [_last(group, window) for group in self.decodes]
        return self.windowed[window]


def plan(batch: Batch, kv_heads: int) -> Batch:
    """The batch with a Plan for cpu/attention.py; the contract is ref/plan.py."""
    starts, rows, lengths = batch.starts.tolist(), batch.rows.tolist(), batch.lengths.tolist()
    prefills, decodes = [], []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        begin, end = starts[i], starts[i + 1]
        if end - begin == 1:
            decodes.append((length, row, begin))
        elif end > begin:
            prefills.append(Prefill(begin, end, batch.slot_table[row, :length]))
    groups = _groups(decodes, GATHERED // kv_heads)
    return batch._replace(plan=Plan(prefills, [_lay_out(group, batch.slot_table, kv_heads) for group in groups], {}))


def _groups(sequences: list[tuple[int, int, int]], room: int) -> Iterator[list[tuple[int, int, int]]]:
    """Part sequences (length first) into groups, ascending in length, whose padded length is at most `room` tokens.

    The shortest of a group is at least half as long as its longest: one long row does not pad all the others.
    """
    left = sorted(sequences)
    while left:
        longest = left[-1][0]
        similar = len(left) - bisect_left(left, (longest // 2,))
        count = max(1, min(similar, room // longest))
        yield left[-count:]
        del left[-count:]


def _lay_out(sequences: list[tuple[int, int, int]], slot_table: torch.Tensor, kv_heads: int) -> Decodes:
    """sequences: (length, row, packed token), ascending in length."""
    lengths, rows, tokens = torch.tensor(sequences).T.contiguous()
    longest = sequences[-1][0]
    slots = slot_table[rows, :longest].long()
    visible = torch.arange(longest) < lengths[:, None]
    # Padding reads the row's own first slot: what lies anywhere else may be NaN, which no mask takes out of a product.
    slots = slots.where(visible, slots[:, :1])
    places = slots[:, None] * kv_heads + torch.arange(kv_heads)[:, None]
    hidden = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return Decodes(tokens, lengths, places.flatten(), hidden.repeat_interleave(kv_heads, 0)[:, None])


def _last(group: Decodes, window: int) -> Decodes:
    """The last `window` positions of each sequence, or all of a shorter one."""
    tokens, lengths, places, hidden = group
    n, longest = len(lengths), hidden.shape[2]
    if longest <= window:
        return group
    first = (lengths - window).clamp(min=0)
    index = first[:, None] + torch.arange(window)
    visible = index < lengths[:, None]
    index = index.where(visible, first[:, None])
    heads = places.view(n, -1, longest)
    taken = heads.gather(2, index[:, None].expand(-1, heads.shape[1], -1))
    masked = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return Decodes(tokens, lengths - first, taken.flatten(), masked.repeat_interleave(heads.shape[1], 0)[:, None])
