"""A ring of shared memory for messages too large for a pipe. The server writes, workers read.

The memory is a memfd whose descriptor the workers inherit: no name to leak, no /dev/shm limit (rule N). Space is
freed in the order it was taken, by the `applied` number of the result header.
"""

import mmap
import os
from collections import deque
from contextlib import suppress


class Arena:
    """`size` bytes. The writer takes and frees; a reader only calls `view`."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._memory = mmap.mmap(fd, size)
        self._taken: deque[tuple[int, int, int]] = deque()  # (message number, begin, end)
        self._head = 0

    @classmethod
    def create(cls, size: int) -> "Arena":
        fd = os.memfd_create("aiollm-arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, size)

    @classmethod
    def attach(cls, fd: int) -> "Arena":
        return cls(fd, os.fstat(fd).st_size)

    def put(self, number: int, body: bytes) -> int | None:
        """Copy a message's body in; its offset, or None while there is no room.

        Raises ValueError for a body that exceeds the arena.
        """
        if len(body) > self.size:
            raise ValueError(f"a message of {len(body)} bytes exceeds the arena of {self.size} bytes")
        offset = self._place(len(body))
        if offset is None:
            return None
        self._memory[offset : offset + len(body)] = body
        self._head = offset + len(body)
        self._taken.append((number, offset, self._head))
        return offset

    def _place(self, length: int) -> int | None:
        if not self._taken:
            return 0
        tail = self._taken[0][1]
        if self._head > tail:  # taken: [tail, head)
            if self._head + length <= self.size:
                return self._head
            return 0 if length < tail else None
        return self._head if self._head + length < tail else None  # taken: [tail, size) and [0, head)

    def free(self, applied: int) -> None:
        """Release every message up to number `applied`."""
        while self._taken and self._taken[0][0] <= applied:
            self._taken.popleft()

    @property
    def used(self) -> int:
        """Messages that still hold space."""
        return len(self._taken)

    def view(self, offset: int, length: int) -> memoryview:
        """A window on a message's body, valid until its number was reported as applied."""
        return memoryview(self._memory)[offset : offset + length]

    def close(self) -> None:
        """Give the descriptor and, where no view is left, the mapping back."""
        os.close(self.fd)
        with suppress(BufferError):  # somebody still looks into it; the mapping goes with that view
            self._memory.close()
