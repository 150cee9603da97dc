"""Runs one step on the device: upload, forward, sample, store, copy back. One function for every kind of step."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from aiollm.kernels.batch import Batch, Sampled
from aiollm.kernels.ops import Ops
from aiollm.workers.arrivals import Arrivals, Columns
from aiollm.workers.flight import NO_HIDDEN, Outcome
from aiollm.workers.graphs import Bias, Graphs
from aiollm.workers.staging import Staged, Staging, views
from aiollm.workers.state import State
from aiollm.workers.step import Embed, Room, Step
from aiollm.workers.stream import StateLost
from aiollm.workers.tp import TensorParallel

LOGIT_ROWS = 256  # prompt positions whose logits exist at once; keeps the memory of an echoed prompt flat

Pools = list[tuple[torch.Tensor, torch.Tensor]]


class Model(Protocol):
    def forward(self, ids: torch.Tensor, batch: Batch, kv: Pools) -> torch.Tensor:
        """ids [tokens] int64 -> hidden [tokens, h], keys and values stored in `kv`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, h] -> [r, vocabulary]."""

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, h] -> the same behind the final norm."""


class Begun(NamedTuple):
    """A step that lacks its drawing."""

    columns: Columns
    hidden: torch.Tensor
    bias: Bias | None
    scales: torch.Tensor | None
    prompts: list[tuple[np.ndarray, ...]]


class ModelRunner:
    """A model, its KV pools (per layer: keys and values, [slots + 1, kv_heads, head_dim]) and the rows' state.

    A step computes at most `budget` tokens besides one for each row.
    """

    def __init__(self, model: Model, kv: Pools, state: State, ops: Ops, tp: TensorParallel, budget: int) -> None:
        self.model = model
        self.kv = kv
        self.state = state
        self.ops = ops
        self.tp = tp
        self.budget = budget
        rows, max_length = state.hold, state.slot_table.shape[1]
        self.arrivals = Arrivals(Room(rows, rows + budget, rows), state.tokens.device)
        self.staging = Staging(pinned=state.tokens.is_cuda, size=self.arrivals.size)
        self.mask_staging = Staging(pinned=state.tokens.is_cuda)
        self.graphs = Graphs(self, self.arrivals, rows, max_length)

    def room(self, needs: Room, mixed: bool, top_n: int) -> Room:
        """What a step's columns should hold; under the baton, right before its launch."""
        return self.graphs.room(needs, mixed, top_n)

    @property
    def prepares(self) -> bool:
        """Whether sizes are left to be captured in idle times. With several ranks there are none: they would have to
        agree on it."""
        return bool(self.graphs.pending)

    def prepare(self) -> None:
        """Capture one of them."""
        self.graphs.capture_next()

    def run(self, step: Step) -> Outcome:
        """Launch a step. On a GPU the arrays that it returns are filled when the launch is done, and not before."""
        return self.finish(step, self.begin(step), None)

    def begin(self, step: Step) -> Begun:
        """Launch what comes before the drawing."""
        try:
            columns = self.arrivals.columns(step.room)
            brought = self.arrivals.take(step.staged, step.room)
            self.state.upload(len(step.updates), brought)
        except Exception as error:
            raise StateLost(f"the updates of a step could not be laid down: {error}") from error
        hidden = self.graphs.forward(step.room, step.max_new > 1)
        if hidden is None:
            hidden = self.forward(columns, step.max_new, step.max_length)
        prompts = [self._prompt_logprobs(hidden, columns, p.begin, p.length, p.top) for p in step.prompts]
        bias = (brought["bias.ids"], brought["bias.values"]) if "bias.ids" in brought else None
        return Begun(columns, hidden, bias, brought.get("bias.scales"), prompts)

    def finish(self, step: Step, begun: Begun, masks: Staged | None) -> Outcome:
        """Launch the drawing, right behind `begin` of the same step; `masks` holds the columns of `masking`."""
        columns, hidden, bias, scales, prompts = begun
        embedded = self._embedded(hidden, step.embeds)
        n, top = step.sampled, max(0, step.top_n)
        if not n:
            ids, values = np.empty((0, top), np.int64), np.empty((0, top), np.float32)
            return Outcome(np.empty(0, np.int64), np.empty(0, np.float32), ids, values, prompts)
        try:
            if masks is not None:
                self.state.mask(**views(masks.buffer, masks.places))
            replayed = self.graphs.draw(step.room, hidden, bias, top) if scales is None else None  # those have no graph
            drawn = replayed or self.draw(columns, hidden, bias, top, scales)
        finally:  # the masks of a drawing that failed must not bind the next one
            if masks is not None:
                self.state.unmask()
        return Outcome(
            _to_host(drawn.tokens[:n]),
            _to_host(drawn.logprobs[:n]),
            _to_host(drawn.top_ids[:n, :top]),
            _to_host(drawn.top_logprobs[:n, :top]),
            prompts,
            embedded,
        )

    def forward(self, columns: Columns, max_new: int, max_length: int) -> torch.Tensor:
        """Hidden states [tokens, h] of the tokens that the columns name, before the final norm."""
        ids, batch = self.state.batch(columns, max_new, max_length, self.ops)
        return self.model.forward(ids, batch, self.kv)

    def draw(
        self, columns: Columns, hidden: torch.Tensor, bias: Bias | None, top_n: int, scales: torch.Tensor | None = None
    ) -> Sampled:
        """Draw the next token of each sampled sequence and append it to its row, on every rank alike."""
        logits = self.model.logits(hidden.index_select(0, columns["last"]))
        if bias is not None and scales is not None:
            bias = _scaled(bias, scales, columns["bias_starts"], logits)
        drawn = self.ops.sample(logits, self.state.sampling(columns, bias, top_n))
        drawn = drawn._replace(tokens=self.tp.broadcast(drawn.tokens))
        self.state.store(columns, drawn.tokens, self.ops)
        return drawn

    def _embedded(self, hidden: torch.Tensor, embeds: Sequence[Embed]) -> np.ndarray:
        """The hidden states that are wanted, [embeds, h] float32."""
        if not embeds:
            return NO_HIDDEN
        return _to_host(self.model.normed(torch.stack([hidden[embed.token] for embed in embeds])).float())

    def _prompt_logprobs(
        self, hidden: torch.Tensor, columns: Columns, begin: int, count: int, top: int
    ) -> tuple[np.ndarray, ...]:
        """What the op `logprobs` says of the tokens that follow `count` tokens of the packed axis; logits in slices of
        LOGIT_ROWS."""
        parts = []
        for at in range(begin, begin + count, LOGIT_ROWS):
            here = slice(at, min(at + LOGIT_ROWS, begin + count))
            targets = self.state.tokens[columns["token_rows"][here], columns["positions"][here] + 1].long()
            parts.append(self.ops.logprobs(self.model.logits(hidden[here]), targets, top))
        return tuple(_to_host(torch.cat(column)) for column in zip(*parts, strict=True))


def _scaled(bias: Bias, scales: torch.Tensor, starts: torch.Tensor, logits: torch.Tensor) -> Bias:
    """Bias [b] of sequences that begin at `starts` [r + 1], with scales [b] times the logits [r, vocabulary] added."""
    ids, values = bias
    at = torch.searchsorted(starts[1:], torch.arange(len(ids), device=ids.device), right=True, out_int32=True)
    # Ids outside of the vocabulary, which a tokenizer may have for its end of sequence, are nobody's.
    added = scales * logits[at, ids.clamp(max=logits.shape[1] - 1)].float().abs()
    return ids, values + added.nan_to_num(0.0, posinf=0.0)  # an infinite logit stays what it is


def _to_host(values: torch.Tensor) -> np.ndarray:
    """A copy on the host: from a GPU in pinned memory, filled behind what was launched before."""
    copied: np.ndarray = values.to("cpu", non_blocking=True, copy=True).numpy()
    return copied
