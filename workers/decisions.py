"""Rule O: with several ranks, rank 0 writes what it decided each turn and the others do the same.

What an iteration computes follows from the updates applied and the posts made before it, and posts are a matter of
turns; so a decision is how far to apply, which rows wait for their grammars, whether to launch, and a checksum of the
rows to prove it. The log is a pipe to each follower: ordered, blocking without spinning, and its end tells that rank 0
is gone.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aiollm.wire.columns import Ints, ints, pack
from aiollm.workers.step import Integers

_RECORD = struct.Struct("<qqBBIII")  # as in Decision, with how many rows wait and are held
_INT = 4  # bytes of a packed one


class Decision(NamedTuple):
    iteration: int
    applied: int
    launching: bool
    stopping: bool
    checksum: int
    waiting: Ints
    """Rows that draw nothing yet."""
    held: Ints
    """Rows that the iteration launched last was to draw for, and did not."""


class Decisions:
    """Rank 0 has `followers` (descriptors to write), the others `source` (to read), a single rank neither."""

    def __init__(self, source: int | None = None, followers: Sequence[int] = ()) -> None:
        self._source = source
        self._followers = followers

    @property
    def leads(self) -> bool:
        return self._source is None

    @property
    def alone(self) -> bool:
        return self._source is None and not self._followers

    def write(
        self, iteration: int, applied: int, launching: bool, stopping: bool, rows: Integers,
        waiting: Sequence[int] = (), held: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Tell the followers; EOFError when one of them is gone."""
        if self._followers:
            head = (iteration, applied, launching, stopping, _checksum(rows), len(waiting), len(held))
            record = _RECORD.pack(*head) + pack([*waiting, *held])
            try:
                for fd in self._followers:
                    os.write(fd, record)  # the pipe blocks: all of it
            except BrokenPipeError:
                raise EOFError("a rank that follows went away") from None

    def read(self) -> Decision:
        """Wait for rank 0; EOFError when it is gone."""
        *head, waiting, held = _RECORD.unpack(self._read(_RECORD.size))
        iteration, applied, launching, stopping, checksum = head
        rows = ints(self._read(_INT * (waiting + held)))
        return Decision(
            iteration, applied, bool(launching), bool(stopping), checksum, rows[:waiting], rows[waiting:]
        )  # fmt: skip

    def _read(self, size: int) -> bytes:
        assert self._source is not None
        found = b""
        while len(found) < size:
            part = os.read(self._source, size - len(found))
            if not part:
                raise EOFError("rank 0 went away")
            found += part
        return found

    def check(self, decision: Decision, iteration: int, applied: int, rows: Integers) -> None:
        """Raises RuntimeError where this rank would do something else than rank 0 did."""
        if (decision.iteration, decision.applied, decision.checksum) != (iteration, applied, _checksum(rows)):
            raise RuntimeError(f"this rank fell out of step with rank 0 at iteration {iteration}")


def _checksum(rows: Integers) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).tobytes())
