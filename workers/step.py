"""One iteration as a value: what to upload, what to compute, what to sample. Nothing in it changes after the launch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiollm.wire.messages import Admit, Update
from aiollm.workers.staging import Staged, Staging

Integers = NDArray[np.int64]


class Bias(NamedTuple):
    """What is added to the logits of sampled sequences: entry i goes to sequence at[i], token ids[i]; `at` ascends."""

    at: list[int]
    ids: list[int]
    values: list[float]


class PromptSlice(NamedTuple):
    """Tokens of the packed axis whose successors' logprobs a request asked for."""

    row: int
    generation: int
    begin: int
    length: int
    start: int
    """Position of the first successor."""
    top: int


class Step(NamedTuple):
    """Sequences stand in one order: decode rows, then chunks. `ints` holds the columns, staged for the device."""

    updates: list[Update]
    """Applied since the last launch, in order."""
    admits: list[Admit]
    ints: Staged
    sequences: int
    tokens: int
    sampled: int
    max_new: int
    max_length: int
    top_n: int
    bias: Bias
    prompts: list[PromptSlice]


def stage(staging: Staging, rows: Integers, starts: Integers, counts: Integers, sampled: Integers) -> Staged:
    """Pack a step's integer columns: sequence i computes `counts[i]` tokens of `rows[i]` from position `starts[i]`;
    `sampled` lists the sequences that draw a token."""
    ends = np.cumsum(counts)
    offsets = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
    return staging.put(
        rows=rows,
        starts=np.concatenate([[0], ends]),
        lengths=starts + counts,
        token_rows=np.repeat(rows, counts),
        positions=np.repeat(starts, counts) + offsets,
        last=ends[sampled] - 1,
        sampled_rows=rows[sampled],
        sampled_lengths=(starts + counts)[sampled],
    )
