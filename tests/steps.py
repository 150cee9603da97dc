"""One step by hand, as the loop builds it."""

from collections.abc import Sequence

import numpy as np
import torch

from aiollm.wire.messages import Update
from aiollm.workers import uploads
from aiollm.workers.flight import Outcome
from aiollm.workers.runner import ModelRunner
from aiollm.workers.staging import Staging
from aiollm.workers.step import NO_BIAS, Bias, Embed, PromptSlice, Room, Step, columns


def run(
    runner: ModelRunner, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], sampled: Sequence[int],
    updates: Sequence[Update] = (), bias: Bias = NO_BIAS, top_n: int = -1, prompts: Sequence[PromptSlice] = (),
    embeds: Sequence[Embed] = (),
) -> Outcome:  # fmt: skip
    """Compute `counts[i]` tokens of `rows[i]` from `starts[i]`; `sampled` lists the sequences that draw a token."""
    given = [np.asarray(column, np.int64) for column in (rows, starts, counts, sampled)]
    room = runner.room(Room(len(rows), sum(counts), len(sampled)), max(counts) > 1, top_n)
    own = columns(*given, bias, room, runner.state.hold)
    longest = max(s + c for s, c in zip(starts, counts, strict=True))
    staged = Staging().put(own | uploads.columns(updates, bias))
    with torch.inference_mode():
        return runner.run(
            Step(list(updates), staged, room, len(sampled), max(counts), longest, top_n, list(prompts), embeds)
        )
