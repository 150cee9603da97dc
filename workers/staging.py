"""Host memory from which a step's integers are copied to the device: a ring, each place guarded by the launch that
reads it (rule A). One copy a step, pinned where the device is a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from aiollm.workers.stream import Pending

PLACES = 3  # two launches in flight and the one being built


class Staged(NamedTuple):
    """Columns side by side in one buffer; `views` cuts a copy of it, on any device, back into columns."""

    buffer: torch.Tensor  # [total] int64
    columns: tuple[tuple[str, int, int], ...]  # (name, begin, end)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: buffer[begin:end] for name, begin, end in self.columns}


class Staging:
    """`put` fills the next place; `guard` ties it to the launch that reads it."""

    def __init__(self, pinned: bool = False, places: int = PLACES) -> None:
        self._pinned = pinned
        self._buffers = [self._allocate(1024) for _ in range(places)]
        self._guards: list[Pending | None] = [None] * places
        self._next = 0

    def _allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=self._pinned)

    def put(self, **columns: NDArray[np.int64] | Sequence[int]) -> Staged:
        """Copy columns into the next place of the ring, waiting for the launch that still reads it."""
        place = self._next
        guard = self._guards[place]
        if guard is not None:
            guard.wait()
        total = sum(len(column) for column in columns.values())
        if total > len(self._buffers[place]):
            self._buffers[place] = self._allocate(2 * total)
        buffer = self._buffers[place][:total]
        flat, at, layout = buffer.numpy(), 0, []
        for name, column in columns.items():
            flat[at : at + len(column)] = column
            layout.append((name, at, at + len(column)))
            at += len(column)
        return Staged(buffer, tuple(layout))

    def guard(self, pending: Pending) -> None:
        """The place filled last is free again once `pending` is done."""
        self._guards[self._next] = pending
        self._next = (self._next + 1) % len(self._buffers)
