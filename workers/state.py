"""The rows as the device sees them: slot table, token history, sampling parameters. Touched on the stream only."""

import numpy as np
import torch

from aiollm.kernels.batch import Batch, Sampling
from aiollm.kernels.ops import Ops
from aiollm.wire.columns import Runs, ints
from aiollm.workers.step import Step

# What a row that nobody holds has: greedy, and nothing else.
_FLOATS = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0, "repetition": 1.0}


class State:
    """Tables of `rows` rows (and one to hold padding) by `max_length` positions; 8 bytes a position."""

    def __init__(self, rows: int, max_length: int, device: torch.device) -> None:
        self.device = device
        self.slot_table = torch.zeros((rows + 1, max_length), dtype=torch.int32, device=device)
        self.tokens = torch.zeros((rows + 1, max_length), dtype=torch.int32, device=device)
        self.floats = {name: torch.full((rows + 1,), off, device=device) for name, off in _FLOATS.items()}
        self.top_k = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.no_masks = torch.empty((0, 1), dtype=torch.int32, device=device)
        self.unmasked = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)

    def upload(self, step: Step) -> None:
        """Lay down what the updates before this step brought, in their order."""
        if step.admits:
            self._admit(step)
        for update in step.updates:
            self._lay(self.slot_table, update.slots)
            self._lay(self.tokens, update.tokens)

    def _lay(self, table: torch.Tensor, runs: Runs) -> None:
        if not runs:
            return
        counts = ints(runs.counts)
        ends = np.cumsum(counts)
        offsets = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
        rows = torch.from_numpy(np.repeat(ints(runs.rows), counts).astype(np.int64)).to(self.device)
        at = torch.from_numpy((np.repeat(ints(runs.starts), counts) + offsets).astype(np.int64)).to(self.device)
        table[rows, at] = torch.from_numpy(ints(runs.values).copy()).to(self.device)

    def _admit(self, step: Step) -> None:
        latest = {admit.row: admit for admit in step.admits}  # a row may live twice between two launches
        rows = torch.tensor(list(latest), device=self.device)
        params = [admit.sampling for admit in latest.values()]
        columns = {
            "temperature": [p.temperature for p in params],
            "top_p": [p.top_p for p in params],
            "min_p": [p.min_p for p in params],
            "presence": [p.presence_penalty for p in params],
            "frequency": [p.frequency_penalty for p in params],
            "repetition": [p.repetition_penalty for p in params],
        }
        for name, values in columns.items():
            self.floats[name][rows] = torch.tensor(values, device=self.device)
        self.top_k[rows] = torch.tensor([p.top_k for p in params], dtype=torch.int32, device=self.device)
        self.seeds[rows] = torch.tensor([p.seed for p in params], dtype=torch.int64, device=self.device)
        lengths = [admit.prompt_length for admit in latest.values()]
        self.prompt_lengths[rows] = torch.tensor(lengths, dtype=torch.int64, device=self.device)

    def batch(self, step: Step, columns: dict[str, torch.Tensor], ops: Ops) -> tuple[torch.Tensor, Batch]:
        """The token ids to compute, [tokens] int64, and where they belong."""
        positions = columns["positions"]
        ids, slots = ops.inputs(columns["token_rows"], positions, self.tokens, self.slot_table)
        batch = Batch(
            rows=columns["rows"],
            starts=columns["starts"].to(torch.int32),
            lengths=columns["lengths"].to(torch.int32),
            positions=positions,
            slots=slots,
            slot_table=self.slot_table,
            max_new=step.max_new,
            max_length=step.max_length,
        )
        return ids, batch

    def sampling(self, step: Step, columns: dict[str, torch.Tensor]) -> Sampling:
        """How the step's sampled sequences want their tokens; the tables themselves, which the operation looks up."""
        rows = columns["sampled_rows"]
        starts = np.searchsorted(step.bias.at, np.arange(len(rows) + 1)).astype(np.int32)
        return Sampling(
            rows=rows,
            lengths=columns["sampled_lengths"],
            top_k=self.top_k,
            seeds=self.seeds,
            prompt_lengths=self.prompt_lengths,
            tokens=self.tokens,
            bias_starts=torch.from_numpy(starts).to(self.device),
            bias_ids=torch.tensor(step.bias.ids, dtype=torch.int64, device=self.device),
            bias_values=torch.tensor(step.bias.values, dtype=torch.float32, device=self.device),
            masks=self.no_masks,
            mask_lines=self.unmasked[: len(rows)],
            top_n=max(0, step.top_n),
            **self.floats,
        )

    def store(self, columns: dict[str, torch.Tensor], drawn: torch.Tensor, ops: Ops) -> None:
        """Append drawn tokens [r] int64 to their rows; a drawn -1 (no finite logits) is stored as 0."""
        ops.store(self.tokens, columns["sampled_rows"], columns["sampled_lengths"], drawn)
