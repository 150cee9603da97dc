"""Runs one step on the device: upload, forward, sample, store, copy back. One function for every kind of step."""

from typing import Protocol

import numpy as np
import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import Ops
from aiollm.workers.loop import Outcome, StateLost
from aiollm.workers.state import State
from aiollm.workers.step import Step
from aiollm.workers.tp import TensorParallel

LOGIT_ROWS = 256  # prompt positions whose logits exist at once; keeps the memory of an echoed prompt flat

Pools = list[tuple[torch.Tensor, torch.Tensor]]


class Model(Protocol):
    def forward(self, ids: torch.Tensor, batch: Batch, kv: Pools) -> torch.Tensor:
        """ids [tokens] int64 -> hidden [tokens, h], keys and values stored in `kv`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, h] -> [r, vocabulary]."""


class ModelRunner:
    """A model, its KV pools (per layer: keys and values, [slots + 1, kv_heads, head_dim]) and the rows' state."""

    def __init__(self, model: Model, kv: Pools, state: State, ops: Ops, tp: TensorParallel) -> None:
        self.model = model
        self.kv = kv
        self.state = state
        self.ops = ops
        self.tp = tp

    def run(self, step: Step) -> Outcome:
        columns = step.ints.views(step.ints.buffer.to(self.state.device, non_blocking=True))
        try:
            self.state.upload(step)
        except Exception as error:
            raise StateLost(f"the updates of a step could not be laid down: {error}") from error
        ids, batch = self.state.batch(step, columns, self.ops)
        hidden = self.model.forward(ids, batch, self.kv)
        prompts = [self._prompt_logprobs(hidden, batch, columns, p.begin, p.length, p.top) for p in step.prompts]
        if not step.sampled:
            empty = np.empty((0, max(0, step.top_n)))
            return Outcome(np.empty(0, np.int64), np.empty(0, np.float32), empty, empty, prompts)
        sampled = self.ops.sample(self.model.logits(hidden[columns["last"]]), self.state.sampling(step, columns))
        tokens = self.tp.broadcast(sampled.tokens)
        self.state.store(columns, tokens, self.ops)
        return Outcome(
            tokens.cpu().numpy(),
            sampled.logprobs.cpu().numpy(),
            sampled.top_ids.cpu().numpy(),
            sampled.top_logprobs.cpu().numpy(),
            prompts,
        )

    def _prompt_logprobs(
        self, hidden: torch.Tensor, batch: Batch, columns: dict[str, torch.Tensor], begin: int, count: int, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logprobs of the tokens that follow `count` tokens of the packed axis; logits in slices of LOGIT_ROWS."""
        parts = []
        for at in range(begin, begin + count, LOGIT_ROWS):
            here = slice(at, min(at + LOGIT_ROWS, begin + count))
            targets = self.state.tokens[columns["token_rows"][here], batch.positions[here] + 1].long()
            parts.append(self.ops.logprobs(self.model.logits(hidden[here]), targets, top))
        own, ids, values = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return own, ids, values
