"""One iteration as a value: what to upload, what to compute, what to sample. Nothing in it changes after the launch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from aiollm.wire.messages import Update
from aiollm.workers.staging import Column, Place, Staged, lay_out

Integers = NDArray[np.int64]


class Room(NamedTuple):
    """How much a step's columns hold: a graph's sizes, or just what the step needs. Past the step's own they are
    padded with the hold row (rule J)."""

    sequences: int
    tokens: int
    sampled: int


class Bias(NamedTuple):
    """What is added to the logits of sampled sequences: entry i goes to sequence at[i], token ids[i]; `at` ascends.

    It is values[i], and scales[i] times the logit's absolute value where there are scales.
    """

    at: list[int]
    ids: list[int]
    values: list[float]
    scales: Sequence[float] = ()


NO_BIAS = Bias([], [], [])


class PromptSlice(NamedTuple):
    """Tokens of the packed axis whose successors' logprobs a request asked for."""

    row: int
    generation: int
    begin: int
    length: int
    start: int
    """Position of the first successor."""
    top: int


class Embed(NamedTuple):
    """A sampled sequence whose hidden state is wanted, and its last token on the packed axis."""

    sequence: int
    token: int


class Step(NamedTuple):
    """Sequences stand in one order: decode rows, then chunks. `staged` holds its columns: those of `columns` first,
    then those of `uploads.columns` and the entries of the bias."""

    updates: list[Update]
    """Applied since the last launch, in order."""
    staged: Staged
    room: Room
    sampled: int
    max_new: int
    max_length: int
    top_n: int
    prompts: list[PromptSlice]
    embeds: Sequence[Embed] = ()


def drawing(room: Room) -> dict[str, Place]:
    """Where the columns lie that name what is sampled."""
    r = room.sampled
    return lay_out({
        "last": (r, torch.int64),  # on the packed axis
        "sampled_rows": (r, torch.int64),
        "sampled_lengths": (r, torch.int64),
        "bias_starts": (r + 1, torch.int32),
    })  # fmt: skip


def computing(room: Room) -> dict[str, Place]:
    """Where, behind those of the drawing, the columns lie that name what is computed."""
    n, t = room.sequences, room.tokens
    return lay_out({
        "rows": (n, torch.int64),
        "starts": (n + 1, torch.int32),
        "lengths": (n, torch.int32),
        "token_rows": (t, torch.int64),
        "positions": (t, torch.int64),
    })  # fmt: skip


def masking(sampled: int, masked: int, words: int) -> dict[str, tuple[int, torch.dtype]]:
    """What the drawing of `masked` out of `sampled` sequences brings: masks line by line, and each sequence's line."""
    return {"masks": (masked * words, torch.int32), "lines": (sampled, torch.int32)}


def columns(
    rows: Integers, starts: Integers, counts: Integers, sampled: Integers, bias: Bias, room: Room, hold: int
) -> dict[str, Column]:
    """A step's columns: sequence i computes `counts[i]` tokens of `rows[i]` from position `starts[i]`; `sampled` lists
    the sequences that draw a token. Padding: sequences without tokens, and tokens at position 0 of the row `hold`."""
    ends = np.cumsum(counts)
    total = int(ends[-1])
    offsets = np.arange(total) - np.repeat(ends - counts, counts)
    lengths = starts + counts
    return {
        "last": _padded(ends[sampled] - 1, room.sampled, 0),
        "sampled_rows": _padded(rows[sampled], room.sampled, hold),
        "sampled_lengths": _padded(lengths[sampled], room.sampled, 0),
        "bias_starts": np.searchsorted(bias.at, np.arange(room.sampled + 1)).astype(np.int32),
        "rows": _padded(rows, room.sequences, hold),
        "starts": _padded(np.concatenate([[0], ends]).astype(np.int32), room.sequences + 1, total),
        "lengths": _padded(lengths.astype(np.int32), room.sequences, 0),
        "token_rows": _padded(np.repeat(rows, counts), room.tokens, hold),
        "positions": _padded(np.repeat(starts, counts) + offsets, room.tokens, 0),
    }


def _padded(column: Column, size: int, value: int) -> Column:
    if len(column) == size:
        return column
    padded = np.full(size, value, column.dtype)
    padded[: len(column)] = column
    return padded
