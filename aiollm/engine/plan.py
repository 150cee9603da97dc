"""The update being drafted: lists while the scheduler thinks, packed columns when it is sent."""

import numpy as np

from aiollm.wire.columns import Ints, Runs, pack
from aiollm.wire.messages import Admit, Update


class RunList:
    """Runs of values to be laid into a (row, position) table."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.values: list[np.ndarray] = []

    def add(self, row: int, start: int, values: np.ndarray) -> None:
        if len(values):
            self.rows.append(row)
            self.starts.append(start)
            self.values.append(values)

    def forget(self, row: int) -> None:
        """Drop the runs of a row that is paused before the draft is sent."""
        kept = [i for i, r in enumerate(self.rows) if r != row]
        for name in ("rows", "starts", "values"):
            setattr(self, name, [getattr(self, name)[i] for i in kept])

    def packed(self) -> Runs:
        if not self.rows:
            return Runs()
        counts = [len(values) for values in self.values]
        return Runs(pack(self.rows), pack(self.starts), pack(counts), pack(np.concatenate(self.values)))


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

    def __bool__(self) -> bool:
        return bool(self.retire or self.admit or self.slots.rows or self.tokens.rows or self.chunk_rows)

    def chunk(self, row: int, start: int, slots: Ints) -> None:
        """Compute `len(slots)` tokens of a row from position `start`, into these slots."""
        self.slots.add(row, start, slots)
        self.chunk_rows.append(row)
        self.chunk_starts.append(start)
        self.chunk_counts.append(len(slots))

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
