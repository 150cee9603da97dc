"""Host memory from which a step's columns are copied to the device: a ring, each place guarded by the launch that reads
it (rule A). One buffer a step, pinned where the device is a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from aiollm.workers.stream import Pending

PLACES = 3  # two launches in flight and the one being built
WORD = 8  # bytes
ALIGNED = 16  # bytes: kernels are compiled anew for an address that is not a multiple of it

Column = NDArray[Any]  # of int64, int32 or float32
TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


class Place(NamedTuple):
    """Where a column lies in a buffer of words."""

    begin: int  # words
    length: int  # numbers
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """Where the next column may begin."""
        return self.begin - (-self.length * self.dtype.itemsize // ALIGNED) * (ALIGNED // WORD)


class Staged(NamedTuple):
    """Columns side by side in one buffer; `views` cuts a copy of it, on any device, back into them."""

    buffer: torch.Tensor  # [words] int64
    places: dict[str, Place]


def views(buffer: torch.Tensor, places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    """The columns that lie in a buffer [words] int64, which they share."""
    return {name: buffer[place.begin : place.end].view(place.dtype)[: place.length] for name, place in places.items()}


def lay_out(shapes: Mapping[str, tuple[int, torch.dtype]]) -> dict[str, Place]:
    """Columns of given lengths and types, one behind the other."""
    places, at = {}, 0
    for name, (length, dtype) in shapes.items():
        places[name] = place = Place(at, length, dtype)
        at = place.end
    return places


class Staging:
    """`put` fills the next place; `guard` ties it to the launch that reads it."""

    def __init__(self, pinned: bool = False, places: int = PLACES, size: int = 1024) -> None:
        """`size` words are there from the beginning; a place grows with what it must hold."""
        self._pinned = pinned
        self._buffers = [self._allocate(size) for _ in range(places)]
        self._guards: list[Pending | None] = [None] * places
        self._next = 0

    def _allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=self._pinned)

    def put(self, columns: Mapping[str, Column]) -> Staged:
        """Copy columns into the next place of the ring, waiting for the launch that still reads it."""
        staged = self.take({name: (len(column), TYPES[column.dtype]) for name, column in columns.items()})
        flat = staged.buffer.numpy()
        for name, column in columns.items():
            place = staged.places[name]
            flat[place.begin : place.end].view(column.dtype)[: place.length] = column
        return staged

    def take(self, shapes: Mapping[str, tuple[int, torch.dtype]]) -> Staged:
        """Room for columns of given lengths and types in the next place of the ring, to be filled before the launch."""
        ring = self._next
        guard = self._guards[ring]
        if guard is not None:
            guard.wait()
        places = lay_out(shapes)
        total = max((place.end for place in places.values()), default=0)
        if total > len(self._buffers[ring]):
            self._buffers[ring] = self._allocate(2 * total)
        return Staged(self._buffers[ring][:total], places)

    def guard(self, pending: Pending) -> None:
        """The place filled last is free again once `pending` is done."""
        self._guards[self._next] = pending
        self._next = (self._next + 1) % len(self._buffers)
