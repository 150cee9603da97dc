"""The update being drafted: arrays while the scheduler thinks, packed columns when it is sent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.node import Keys, Node
from aiollm.wire.columns import Ints, Runs, pack
from aiollm.wire.messages import Admit, Update


class RunList:
    """Runs of values to be laid into a (row, position) table, [n], or into several tables alike, [tables, n]."""

    def __init__(self) -> None:
        self._rows: list[Sequence[int] | NDArray[np.int64]] = []
        self._starts: list[Sequence[int] | NDArray[np.int64]] = []
        self._counts: list[Sequence[int] | NDArray[np.int64]] = []
        self._values: list[np.ndarray] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, start: int, values: np.ndarray) -> None:
        """One run."""
        if values.size:
            self.extend([row], [start], [values.shape[-1]], values)

    def extend(
        self,
        rows: Sequence[int] | NDArray[np.int64],
        starts: Sequence[int] | NDArray[np.int64],
        counts: Sequence[int] | NDArray[np.int64],
        values: np.ndarray,
    ) -> None:
        """Several runs, `counts[i]` of the values each."""
        self._rows.append(rows)
        self._starts.append(starts)
        self._counts.append(counts)
        self._values.append(values)

    def forget(self, row: int) -> None:
        """Drop the runs of a row that is paused before the draft is sent."""
        if not self._rows:
            return
        rows, starts, counts = (np.concatenate(column) for column in (self._rows, self._starts, self._counts))
        kept, values = rows != row, np.concatenate(self._values, axis=-1)
        self._rows, self._starts, self._counts, self._values = [], [], [], []
        if kept.any():
            self.extend(rows[kept], starts[kept], counts[kept], values[..., np.repeat(kept, counts)])

    def packed(self) -> Runs:
        if not self._rows:
            return Runs()
        columns = (self._rows, self._starts, self._counts, self._values)
        return Runs(*(pack(np.concatenate(column, axis=-1)) for column in columns))


class Draft:
    """Fields in the order in which the worker applies them."""

    def __init__(self) -> None:
        self.retire: list[int] = []
        self.admit: list[Admit] = []
        self.slots = RunList()
        self.tokens = RunList()
        self.chunk_rows: list[int] = []
        self.chunk_starts: list[int] = []
        self.chunk_counts: list[int] = []
        self.indexed: dict[tuple[int, int, int], tuple[Node, Keys]] = {}
        """The chunks that went into the index: (row, generation, start) -> root and tokens up to the chunk's end."""

    def __bool__(self) -> bool:
        return bool(self.retire or self.admit or self.slots or self.tokens or self.chunk_rows)

    def chunk(self, row: int, start: int, slots: Ints) -> None:
        """Compute tokens of a row from position `start`, into these slots, [groups, tokens]."""
        self.slots.add(row, start, slots)
        self.chunk_rows.append(row)
        self.chunk_starts.append(start)
        self.chunk_counts.append(slots.shape[-1])

    def packed(self, number: int) -> Update:
        return Update(
            number=number,
            retire=pack(self.retire),
            admit=self.admit,
            slots=self.slots.packed(),
            tokens=self.tokens.packed(),
            chunk_rows=pack(self.chunk_rows),
            chunk_starts=pack(self.chunk_starts),
            chunk_counts=pack(self.chunk_counts),
        )
