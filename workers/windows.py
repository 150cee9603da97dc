"""Where layers with a sliding window find the slots of what they see.

Of each row the tables keep as many positions as there may be between what a step still sees and what is granted, one
behind the other and then over the first: 131,072 positions of 1,024 rows would take 0.5 GB for each group. A step's
attention gets tables of its own, in which every sequence begins where its window does: what lies before makes no
difference to it.
"""

import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.wire.messages import MOST_CREDIT

ROUND = 16  # columns: tables begin at a multiple of 16 bytes, and strides of so many numbers are common


def ring(window: int, budget: int) -> int:
    """Positions to keep of a row: what its next token sees, and a chunk of `budget` tokens or the credit before it."""
    return _rounded(window + max(budget, MOST_CREDIT) + 2)  # the last chunk brings two slots of credit


class Windows:
    """Tables of `groups` groups: the slot of position p of a row is in column p % columns."""

    def __init__(self, groups: int, window: int, rows: int, columns: int, device: torch.device) -> None:
        self.tables = torch.zeros((groups, rows + 1, columns), dtype=torch.int32, device=device)
        self._window = window
        self._slot = 0

    def pad_into(self, slot: int) -> None:
        """As State has it."""
        self.tables[:, -1] = slot
        self._slot = slot

    def lay(self, rows: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Write the slots [groups * n] of an update's runs; `rows` and `positions` [n]. Of each row the last count, the
        others go where padding is: how many there are is not known on the host."""
        groups, lines, columns = self.tables.shape
        if not groups:
            return
        last = positions.new_zeros(lines).scatter_reduce(0, rows, positions, "amax")
        passed = positions <= last[rows] - columns
        values = values.view(groups, -1).masked_fill(passed, self._slot)
        self.tables[:, rows.masked_fill(passed, lines - 1), positions % columns] = values

    def batches(self, batch: Batch, token_rows: torch.Tensor, ops: Ops) -> tuple[Batch, ...]:
        """What the layers of each group see of a batch, as sequences that begin with it."""
        groups, _, columns = self.tables.shape
        if not groups:
            return ()
        device, n = batch.lengths.device, len(batch.lengths)
        before = self._window - 1
        low = (batch.lengths - batch.starts.diff() - before).clamp(min=0)
        span = min(_rounded(before + batch.max_new), columns)  # a graph's max_new is more than a chunk may have
        # In int32: for 1,024 sequences by 6,160 columns that is 24 MiB each time.
        shown = (low[:, None] + torch.arange(span, dtype=torch.int32, device=device)) % columns
        seen = (batch.rows[:, None] * columns).int() + shown
        tables = self.tables.flatten(1).index_select(1, seen.flatten()).view(groups, n, span)
        shared = batch._replace(
            rows=torch.arange(n, device=device), lengths=batch.lengths - low, max_length=min(batch.max_length, span)
        )
        places = batch.positions % columns
        return tuple(
            shared._replace(slots=ops.inputs(token_rows, places, own, own)[1], slot_table=table)
            for own, table in zip(self.tables.unbind(), tables.unbind(), strict=True)
        )


def _rounded(columns: int) -> int:
    return -(-columns // ROUND) * ROUND
