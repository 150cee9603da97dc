"""Inputs for the tests and benchmarks of the kernels: the awkward shapes, and batches whose slots lie scattered."""

from collections.abc import Sequence

import torch

from aiollm.kernels.batch import Batch, Sampling

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
    bias: Sequence[tuple[int, int, float]] = (),
    top_n: int = 0,
) -> Sampling:
    """A Sampling of `rows` rows; a scalar holds for all of them. `bias` entries are (row, token, value).

    The history past a row's length holds an id that is in no vocabulary, as fresh memory may.
    """

    def column(value: float | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value] * rows if isinstance(value, int | float) else list(value), dtype=dtype)

    prompts = prompts or [[]] * rows
    generated = generated or [[]] * rows
    histories = [[*p, *g] for p, g in zip(prompts, generated, strict=True)]
    tokens = torch.full((rows + 1, max(map(len, histories), default=0) + 3), -(1 << 30), dtype=torch.int32)
    for i, history in enumerate(histories):  # row i's history lies in the last row but i
        tokens[rows - i, : len(history)] = torch.tensor(history, dtype=torch.int32)
    columns = {
        name: column(value, torch.float32)
        for name, value in {
            "temperature": temperature, "top_p": top_p, "min_p": min_p,
            "presence": presence, "frequency": frequency, "repetition": repetition,
        }.items()
    }  # fmt: skip
    return Sampling(
        rows=rows - torch.arange(rows),
        top_k=column(top_k, torch.int32),
        seeds=torch.arange(rows) if seeds is None else torch.tensor(list(seeds), dtype=torch.int64),
        prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
        lengths=torch.tensor([len(h) for h in histories], dtype=torch.int64),
        tokens=tokens,
        bias_index=torch.tensor([b[0] for b in bias], dtype=torch.int64),
        bias_ids=torch.tensor([b[1] for b in bias], dtype=torch.int64),
        bias_values=torch.tensor([b[2] for b in bias], dtype=torch.float32),
        any_random=bool((columns["temperature"] > 0).any()),
        any_penalty=bool(
            (columns["presence"] != 0).any() or (columns["frequency"] != 0).any() or (columns["repetition"] != 1).any()
        ),
        top_n=top_n,
        **columns,
    )
