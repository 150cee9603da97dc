"""Inputs for the tests and benchmarks of the kernels: the awkward shapes, and batches whose slots lie scattered."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from aiollm.kernels.batch import Batch, Sampling
from aiollm.kernels.variants import Norm, Scoring

ROWS = (0, 1, 2, 63, 100)
# (cached, new) of each sequence: decode only, prefill only, and both mixed, at lengths that divide nothing.
SEQUENCES: dict[str, list[tuple[int, int]]] = {
    "empty": [],
    "first_token": [(0, 1)],
    "decode": [(0, 1), (62, 1), (63, 1), (64, 1), (999, 1)],
    "prefill": [(0, 1), (0, 63), (0, 200)],
    "chunk": [(7, 130), (300, 65)],
    "mixed": [(17, 1), (0, 33), (500, 1), (64, 7), (1, 1), (0, 2)],
    "no_new": [(5, 0), (5, 1), (9, 0), (0, 3)],
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, rounded to `dtype`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(device: torch.device, *values: Any) -> tuple[Any, ...]:
    """The values with every tensor, in named tuples too, copied to `device`."""
    return tuple(_mapped(value, lambda tensor: tensor.to(device)) for value in values)


def in_float32(*values: Any) -> tuple[Any, ...]:
    """The values with a float32 copy of every tensor, in named tuples too: so that the reference rounds nothing."""
    return tuple(_mapped(value, lambda tensor: tensor.float().clone()) for value in values)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(*(_mapped(part, change) for part in value)) if hasattr(value, "_fields") else value


def make_layer(
    n: int, size: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Norm]:
    """x [n, in], weight [out, in], bias [out] and the norm before, for a layer of `size` (out, in)."""
    n_out, n_in = size
    weight = normal(n_out, n_in, seed=1) / n_in**0.5
    before = Norm(normal(n_in, dtype=dtype, seed=3), 1e-5)
    return normal(n, n_in, dtype=dtype), weight.to(dtype), normal(n_out, dtype=dtype, seed=2), before


SCORINGS = ("plain", "window", "window of one", "softcap", "ALiBi", "sinks", "all")


def make_scoring(name: str, heads: int, width: int, window: int) -> Scoring:
    """One of SCORINGS for so many query heads; `window` is that of the one called so."""
    scale, slopes, sinks = width**-0.5, torch.linspace(0.01, 0.5, heads), torch.linspace(-3, 4, heads)
    return {
        "plain": Scoring(scale),
        "window": Scoring(scale, window=window),
        "window of one": Scoring(scale, window=1),
        "softcap": Scoring(scale, softcap=1.5),
        "ALiBi": Scoring(scale, slopes=slopes),
        "sinks": Scoring(scale, sinks=sinks),
        "all": Scoring(scale, 40, 2.0, slopes, sinks),
    }[name]


def make_batch(
    sequences: Sequence[tuple[int, int]], *, slots: int = 4096, max_length: int = 1024, seed: int = 0
) -> Batch:
    """A Batch of (cached, new) sequences on rows in random order, with slots drawn from 0 to `slots` - 1.

    What the slot table holds past a row's length names no valid slot, so that a kernel that reads there is found out.
    """
    generator = torch.Generator().manual_seed(seed)
    max_rows = len(sequences) + 2
    rows = torch.randperm(max_rows, generator=generator)[: len(sequences)]
    free = torch.randperm(slots, generator=generator)
    table = torch.full((max_rows, max_length), 1 << 30, dtype=torch.int32)
    positions, new_slots, used = [], [], 0
    for row, (cached, new) in zip(rows.tolist(), sequences, strict=True):
        length = cached + new
        own, used = free[used : used + length], used + length
        table[row, :length] = own
        positions.append(torch.arange(cached, length))
        new_slots.append(own[cached:])
    nothing = torch.empty(0, dtype=torch.int64)
    counts = torch.tensor([0, *(new for _, new in sequences)])
    return Batch(
        rows=rows,
        starts=counts.cumsum(0).int(),
        lengths=torch.tensor([cached + new for cached, new in sequences], dtype=torch.int32),
        positions=torch.cat([nothing, *positions]),
        slots=torch.cat([nothing, *new_slots]),
        slot_table=table,
        max_new=max((new for _, new in sequences), default=0),
        max_length=max((cached + new for cached, new in sequences), default=0),
    )


def make_sampling(
    rows: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    min_p: float | Sequence[float] = 0.0,
    presence: float | Sequence[float] = 0.0,
    frequency: float | Sequence[float] = 0.0,
    repetition: float | Sequence[float] = 1.0,
    seeds: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    generated: Sequence[Sequence[int]] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    bias: Sequence[tuple[int, int, float]] = (),
    masks: Mapping[int, Collection[int]] | None = None,
    vocab: int = 0,
    top_n: int = 0,
) -> Sampling:
    """A Sampling of `rows` rows; a scalar holds for all of them. `bias` entries are (row, token, value), and `masks`
    gives the ids that a row may draw, out of `vocab`.

    The history past a row's length holds an id that is in no vocabulary, as fresh memory may.
    """

    def column(value: float | Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value] * rows if isinstance(value, int | float) else list(value), dtype=dtype)

    prompts = prompts or [[]] * rows
    generated = generated or [[]] * rows
    histories = [[*p, *g] for p, g in zip(prompts, generated, strict=True)]
    tokens = torch.full((rows + 1, max(map(len, histories), default=0) + 3), -(1 << 30), dtype=torch.int32)
    for i, history in enumerate(histories):  # row i's history lies in the last row but i
        tokens[rows - i, : len(history)] = torch.tensor(history, dtype=torch.int32)
    order = rows - torch.arange(rows)  # row i's parameters and history lie in the last row but i
    tables = {name: _table(order, column(value, dtype)) for name, (value, dtype) in {
        "temperature": (temperature, torch.float32), "top_p": (top_p, torch.float32), "top_k": (top_k, torch.int32),
        "min_p": (min_p, torch.float32), "presence": (presence, torch.float32), "frequency": (frequency, torch.float32),
        "repetition": (repetition, torch.float32), "seeds": (range(rows) if seeds is None else seeds, torch.int64),
        "prompt_lengths": (prompt_lengths or [len(p) for p in prompts], torch.int64),
    }.items()}  # fmt: skip
    bias = sorted(bias, key=lambda entry: entry[0])
    per_row = torch.tensor([[b[0] == i for b in bias] for i in range(rows)], dtype=torch.int32).reshape(rows, len(bias))
    lines = sorted(masks or {})
    return Sampling(
        rows=order,
        lengths=torch.tensor([len(h) for h in histories], dtype=torch.int64),
        tokens=tokens,
        bias_starts=torch.cat([torch.zeros(1, dtype=torch.int32), per_row.sum(1).cumsum(0).int()]),
        bias_ids=torch.tensor([b[1] for b in bias] + [1 << 40], dtype=torch.int64),
        bias_values=torch.tensor([b[2] for b in bias] + [float("nan")], dtype=torch.float32),
        masks=torch.stack([packed_mask((masks or {})[i], vocab) for i in lines]) if lines else torch.empty(0, 1).int(),
        mask_lines=torch.tensor([lines.index(i) if i in lines else -1 for i in range(rows)], dtype=torch.int32),
        top_n=top_n,
        **tables,
    )


def packed_mask(allowed: Collection[int], vocab: int) -> torch.Tensor:
    """Token ids -> [ceil(vocab / 32)] int32, as a line of `Sampling.masks`."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return torch.from_numpy(words.view(np.int32))


def _table(rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """A table whose `rows` hold `column`; the first row holds what would spoil any result."""
    spoilt = column.new_full((len(rows) + 1,), -7)
    return spoilt.index_copy(0, rows, column)
