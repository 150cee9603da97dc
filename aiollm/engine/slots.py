"""The pool of KV slots: lowest numbers first, in runs where possible, one by one where not."""

import numpy as np

from aiollm.wire.columns import Ints


class SlotPool:
    """Slots 0 .. size - 1. Both calls are array operations: their cost hardly depends on how scattered slots are.

    Free slots are handed out in ascending order from a sorted list; what comes back is kept aside and sorted into it
    when the list runs out. So each slot is sorted once for each time it is used, and neighbours come together again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._is_free = np.ones(size, bool)
        self._sorted: Ints = np.arange(size, dtype=np.int32)
        self._at = 0  # what lies before it in `_sorted` was taken
        self._given = np.empty(size, np.int32)
        self._count = 0  # of those given back
        self._place = np.empty(size, np.int32)  # scratch, to find a slot that is given back twice at once

    def take(self, count: int) -> Ints:
        """`count` slots; raises MemoryError when fewer are free."""
        if count > self.free:
            raise MemoryError(f"{count} KV slots wanted, {self.free} free")
        if count > len(self._sorted) - self._at:
            if 32 * self._count > self.size:  # 0.2 ms of a pool of 400,000, which takes 5 ms to be sorted
                self._sorted = np.flatnonzero(self._is_free).astype(np.int32)
            else:
                self._sorted = np.sort(self._free_list())
            self._at = self._count = 0
        slots = self._sorted[self._at : self._at + count]
        self._at += count
        self.free -= count
        self._is_free[slots] = False
        return slots

    def give(self, slots: Ints) -> None:
        """Take slots back, in any order; raises ValueError for one that is free already."""
        if not len(slots):
            return
        places = np.arange(len(slots), dtype=np.int32)
        self._place[slots] = places  # of a slot that stands there twice the last one stays
        if self._is_free[slots].any() or (self._place[slots] != places).any():
            raise ValueError("a KV slot was freed twice")
        self._is_free[slots] = True
        self.free += len(slots)
        self._given[self._count : self._count + len(slots)] = slots
        self._count += len(slots)

    def _free_list(self) -> Ints:
        return np.concatenate([self._sorted[self._at :], self._given[: self._count]])

    def check(self) -> np.ndarray:
        """The free mask, after checking that lists, mask and count agree; raises AssertionError."""
        free = self._free_list()
        mask = np.zeros(self.size, bool)
        mask[free] = True
        assert len(free) == self.free == int(mask.sum()), "a slot is in the free lists twice"
        assert (mask == self._is_free).all(), "free lists and mask disagree"
        return mask
