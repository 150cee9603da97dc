"""The pool of KV slots: one slot per token, handed out as contiguous runs where possible, one by one where not.

Free space is kept as maximal runs, so that freed neighbours join again and the newest freed run is used first.
"""

import numpy as np

from aiollm.wire.columns import Ints

_LOOKS = 4  # runs looked at for one that holds a whole request; more costs more than coalescing gains


class SlotPool:
    """Slots 0 .. size - 1. `take` and `give` cost per run, not per slot."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._is_free = np.ones(size, bool)
        self._length = {0: size} if size else {}  # start of a free run -> its length
        self._start = {size: 0} if size else {}  # end of a free run -> its start
        self._order = [0] if size else []  # starts, newest last; stale ones are skipped

    def take(self, count: int) -> Ints:
        """`count` slots; raises MemoryError when fewer are free."""
        if count > self.free:
            raise MemoryError(f"{count} KV slots wanted, {self.free} free")
        self.free -= count
        parts: list[tuple[int, int]] = []
        while count:
            start = self._choose(count)
            length = self._length.pop(start)
            used = min(length, count)
            if used < length:
                self._put(start + used, length - used)
            else:
                del self._start[start + length]
            parts.append((start, used))
            count -= used
        slots = (
            np.concatenate([np.arange(start, start + used, dtype=np.int32) for start, used in parts])
            if parts
            else np.empty(0, np.int32)
        )
        self._is_free[slots] = False
        return slots

    def give(self, slots: Ints) -> None:
        """Take slots back, in any order; raises ValueError for one that is free already."""
        if not len(slots):
            return
        slots = np.sort(slots)
        if self._is_free[slots].any() or (slots[1:] == slots[:-1]).any():
            raise ValueError("a KV slot was freed twice")
        self._is_free[slots] = True
        self.free += len(slots)
        cuts = np.flatnonzero(np.diff(slots) != 1) + 1
        for run in np.split(slots, cuts):
            start, end = int(run[0]), int(run[-1]) + 1
            after = self._length.pop(end, 0)
            before = self._start.pop(start, start)
            if before != start:
                del self._length[before]
            self._put(before, end + after - before)

    def _put(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        self._order.append(start)
        if len(self._order) > 4 * len(self._length) + 64:
            self._order = [s for s in dict.fromkeys(reversed(self._order)) if s in self._length][::-1]

    def _choose(self, count: int) -> int:
        order = self._order
        while order[-1] not in self._length:
            order.pop()
        newest = order[-1]
        for start in order[: -_LOOKS - 1 : -1]:
            if self._length.get(start, 0) >= count:
                return start
        return newest

    def check(self) -> np.ndarray:
        """The free mask, after checking that runs, mask and count agree; raises AssertionError."""
        mask = np.zeros(self.size, bool)
        for start, length in self._length.items():
            assert length > 0 and self._start[start + length] == start, "free runs disagree"
            assert not mask[start : start + length].any(), "free runs overlap"
            mask[start : start + length] = True
        assert len(self._length) == len(self._start)
        assert (mask == self._is_free).all() and int(mask.sum()) == self.free, "free runs and mask disagree"
        assert set(self._length) <= set(self._order), "a free run is out of reach"
        return mask
