"""The rows as the device sees them: slot table, token history, sampling parameters. Touched on the stream only."""

import torch

from aiollm.kernels.batch import Batch, Sampling
from aiollm.kernels.ops import Ops
from aiollm.workers.uploads import FLOATS, Tensors, laid
from aiollm.workers.windows import Windows

# What a row that nobody holds has: greedy, and nothing else. As FLOATS has them.
_OFF = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
ALIGNED = 16  # tokens; Triton compiles other code for lines that begin anywhere


class State:
    """Tables of `rows` rows, and one that holds padding, by `max_length` positions; 8 bytes each. Layers with
    a window have their own, `windows`. Without a `vocabulary` nothing can be masked.

    A row may be full of its prompt: `tokens` has a place behind it for what is drawn then, and never computed.
    """

    def __init__(
        self, rows: int, max_length: int, device: torch.device, windows: Windows | None = None, vocabulary: int = 0
    ) -> None:
        self.windows = windows or Windows(0, 0, rows, 1, device)
        self.slot_table = torch.zeros((rows + 1, max_length), dtype=torch.int32, device=device)
        self.tokens = torch.zeros(
            (rows + 1, -(-(max_length + 1) // ALIGNED) * ALIGNED), dtype=torch.int32, device=device
        )
        # A line of the table is a column of its own for a kernel: it begins at a multiple of 16 bytes.
        self.floats = torch.tensor(_OFF, device=device)[:, None].expand(-1, -(-(rows + 1) // 4) * 4).contiguous()
        self.top_k = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._no_bias = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
        lines = rows if vocabulary else 0
        self.masks = torch.zeros((lines, -(-vocabulary // 32)), dtype=torch.int32, device=device)
        self.mask_lines = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)

    @property
    def hold(self) -> int:
        """The row that pads."""
        return len(self.tokens) - 1

    def pad_into(self, slot: int) -> None:
        """Keys and values of padding go to this slot, which belongs to nobody."""
        self.slot_table[self.hold] = slot
        self.windows.pad_into(slot)

    @property
    def nbytes(self) -> int:
        return self.slot_table.nbytes + self.tokens.nbytes + self.windows.tables.nbytes + self.masks.nbytes

    def upload(self, updates: int, columns: Tensors) -> None:
        """Lay down what that many updates brought, in their order: the columns of uploads.py."""
        if (rows := columns.get("admit.rows")) is not None:
            self.floats[:, rows] = columns["admit.floats"].view(len(FLOATS), -1)
            self.top_k[rows] = columns["admit.top_k"]
            self.seeds[rows] = columns["admit.seeds"]
            self.prompt_lengths[rows] = columns["admit.prompt_lengths"]
        for rows, positions, values in laid("slots", updates, columns):
            self.slot_table[rows, positions] = values[: len(rows)]
            self.windows.lay(rows, positions, values[len(rows) :])
        for rows, positions, values in laid("tokens", updates, columns):
            self.tokens[rows, positions] = values

    def batch(self, columns: Tensors, max_new: int, max_length: int, ops: Ops) -> tuple[torch.Tensor, Batch]:
        """The token ids to compute, [tokens] int64, and where they belong."""
        positions = columns["positions"]
        ids, slots = ops.inputs(columns["token_rows"], positions, self.tokens, self.slot_table)
        batch = Batch(
            rows=columns["rows"],
            starts=columns["starts"],
            lengths=columns["lengths"],
            positions=positions,
            slots=slots,
            slot_table=self.slot_table,
            max_new=max_new,
            max_length=max_length,
        )
        return ids, batch._replace(windowed=self.windows.batches(batch, columns["token_rows"], ops))

    def sampling(self, columns: Tensors, bias: tuple[torch.Tensor, torch.Tensor] | None, top_n: int) -> Sampling:
        """How the step's sampled sequences want their tokens; the tables themselves, which the operation looks up.

        `bias` holds ids [at least b] int64 and values [at least b] float32.
        """
        rows = columns["sampled_rows"]
        ids, values = bias or self._no_bias
        temperature, top_p, min_p, presence, frequency, repetition = self.floats.unbind()
        return Sampling(
            rows=rows,
            lengths=columns["sampled_lengths"],
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
            top_k=self.top_k,
            seeds=self.seeds,
            prompt_lengths=self.prompt_lengths,
            tokens=self.tokens,
            bias_starts=columns["bias_starts"],
            bias_ids=ids,
            bias_values=values,
            masks=self.masks,
            mask_lines=self.mask_lines[: len(rows)],
            top_n=top_n,
        )

    def mask(self, masks: torch.Tensor, lines: torch.Tensor) -> None:
        """Masks [m * words] int32 for the next draw, of whose sequences [r] `lines` tells the mask, or -1."""
        self.masks.view(-1)[: len(masks)].copy_(masks, non_blocking=True)
        self.mask_lines[: len(lines)].copy_(lines, non_blocking=True)

    def unmask(self) -> None:
        """What is drawn from here on is free."""
        self.mask_lines.fill_(-1)

    def store(self, columns: Tensors, drawn: torch.Tensor, ops: Ops) -> None:
        """Append drawn tokens [r] int64 to their rows; a drawn -1 (no finite logits) is stored as 0."""
        ops.store(self.tokens, columns["sampled_rows"], columns["sampled_lengths"], drawn)
