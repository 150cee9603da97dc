"""Compiles the kernels of a server while its weights load: all those that its steps will launch, on all CPU cores."""

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from aiollm.kernels.ahead import META, launches, link
from aiollm.kernels.device import Device
from aiollm.kernels.ops import Ops
from aiollm.workers import kv, weights
from aiollm.workers.groups import lifetimes
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.runner import LOGIT_ROWS, ModelRunner
from aiollm.workers.sizes import Forward, Size
from aiollm.workers.state import State
from aiollm.workers.tp import Shard, TensorParallel
from aiollm.workers.windows import Windows, ring

log = logging.getLogger(__name__)


class Alone(TensorParallel):
    """A rank of a group that nobody else is in: shapes are those of the group."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(len(logits), self.size * logits.shape[1])

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        return x


class Server(NamedTuple):
    """What tells which kernels one rank of a server launches."""

    spec: DecoderSpec
    dtype: torch.dtype
    ops: Ops
    rank: int
    ranks: int
    rows: int
    max_length: int
    budget: int  # prompt tokens of a step
    sizes: list[Size]  # of its steps, the largest first


def compile_ahead(server: Server, facts: Device) -> None:
    """Fill Triton's cache with what a server launches on a GPU. Nobody may launch in this process meanwhile.

    Raises what a compilation raises.
    """
    tp, spec = Alone(server.rank, server.ranks), _outline(server.spec, server.max_length)
    jobs = max(1, len(os.sched_getaffinity(0)) // server.ranks)
    with torch.inference_mode(), launches(facts, jobs=jobs) as compiled:
        groups = lifetimes(server.spec)
        rings = Windows(groups.each - 1, groups.window, server.rows, ring(groups.window, server.budget), META)
        groups = groups._replace(places=groups.places[: spec.layers])
        state = State(server.rows, server.max_length, META, rings, spec.vocab)
        pools = kv.allocate(1, spec, Shard(spec, tp.rank, tp.size), server.dtype, META, groups)
        own = [group for group, _ in groups.places]
        decoder = Decoder(spec, weights.outline(spec, server.dtype, tp), server.ops, tp, own)
        runner = ModelRunner(decoder, pools, state, server.ops, tp, server.budget)
        largest, *rest = server.sizes
        # Drawing takes the compiler longest: it begins as soon as there are hidden states to draw from.
        for size in [largest, *sorted(rest, key=lambda size: isinstance(size, Forward))]:
            runner.graphs.capture(size)
        if spec.reward is None:  # what prompts with logprobs launch besides
            hidden = torch.empty((LOGIT_ROWS, spec.hidden), dtype=server.dtype, device=META)
            server.ops.logprobs(decoder.logits(hidden), torch.empty(LOGIT_ROWS, dtype=torch.int64, device=META), 1)
    if torch.cuda.is_available():
        link([result for _, result in compiled.values()], jobs)


def meanwhile(work: Callable[[], None]) -> Callable[[], None]:
    """Compile in a thread of its own; the value waits for its end. What goes wrong is told, and comes up again, or not,
    when a kernel is first launched."""

    def run() -> None:
        try:
            work()
        except Exception:
            log.exception("kernels could not be compiled ahead; they will be when they are first launched")

    thread = threading.Thread(target=run, name="compiling", daemon=True)
    thread.start()
    return thread.join


def _outline(spec: DecoderSpec, max_length: int) -> DecoderSpec:
    """As many of the first layers as it takes to see every kind of them, and as many positions as are served."""
    kinds = [spec.reach(layer) for layer in range(spec.layers)]
    layers = max(kinds.index(kind) for kind in set(kinds)) + 1
    return dataclasses.replace(spec, layers=layers, max_position=max_length)
