"""What updates bring for the device's tables, as columns that travel with the step's own."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from aiollm.wire.columns import Runs, ints
from aiollm.wire.messages import Admit, Update
from aiollm.workers.staging import Column
from aiollm.workers.step import Bias

# The sampling parameters of a row that are float32 on the device, in the order of their lines there.
FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
Tensors = Mapping[str, torch.Tensor]


def columns(updates: Sequence[Update], bias: Bias) -> dict[str, Column]:
    """The columns of `updates` in their order, and the entries of a step's bias; none for what is empty."""
    found: dict[str, Column] = {}
    for at, update in enumerate(updates):
        for name, runs in (("slots", update.slots), ("tokens", update.tokens)):
            if runs:
                found |= _laid(f"{name}.{at}", runs)
    # A row may live twice between two launches: its last life counts.
    admits = list({admit.row: admit for update in updates for admit in update.admit}.values())
    if admits:
        params = [admit.sampling for admit in admits]
        found |= {
            "admit.rows": np.array([admit.row for admit in admits], np.int64),
            "admit.floats": np.array([getattr(p, name) for name in FLOATS for p in params], np.float32),
            "admit.top_k": np.array([p.top_k for p in params], np.int32),
            "admit.seeds": np.array([p.seed for p in params], np.int64),
            "admit.prompt_lengths": np.array(list(map(_prompt_length, admits)), np.int64),
        }
    if bias.at:
        found |= {"bias.ids": np.array(bias.ids, np.int64), "bias.values": np.array(bias.values, np.float32)}
    if any(bias.scales):
        found["bias.scales"] = np.array(bias.scales, np.float32)
    return found


def laid(name: str, count: int, columns: Tensors) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows [n], positions [n] and values [tables * n] of the runs called `name` of `count` updates, in their order."""
    for at in range(count):
        if (values := columns.get(f"{name}.{at}.values")) is not None:
            yield columns[f"{name}.{at}.rows"], columns[f"{name}.{at}.positions"], values


def _prompt_length(admit: Admit) -> int:
    """As penalties take it: Sampling.prompt_lengths."""
    return {None: 1, True: 0, False: -1}[admit.sampling.input_penalty] * admit.prompt_length


def _laid(name: str, runs: Runs) -> dict[str, Column]:
    counts = ints(runs.counts)
    ends = np.cumsum(counts, dtype=np.int64)
    offsets = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
    return {
        f"{name}.rows": np.repeat(ints(runs.rows).astype(np.int64), counts),
        f"{name}.positions": np.repeat(ints(runs.starts), counts) + offsets,
        f"{name}.values": ints(runs.values),
    }
