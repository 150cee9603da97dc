"""Compiles the kernels of a server while its weights load: all those that its steps will launch, on all CPU cores."""

import dataclasses
import logging
import os
import threading
from collections.abc import Callable

import torch

from aiollm.kernels.ahead import META, launches
from aiollm.kernels.device import Device
from aiollm.kernels.ops import triton_ops
from aiollm.workers import kv, weights
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import sizes
from aiollm.workers.state import State
from aiollm.workers.tp import Shard, TensorParallel

log = logging.getLogger(__name__)


class Alone(TensorParallel):
    """A rank of a group that nobody else is in: shapes are those of the group."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(len(logits), self.size * logits.shape[1])

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        return x


def compile_ahead(
    spec: DecoderSpec, dtype: torch.dtype, rank: int, ranks: int, rows: int, max_length: int, budget: int, facts: Device
) -> None:
    """Fill Triton's cache with what a server of these sizes launches on a GPU. Nobody may launch in this process
    meanwhile. Raises what a compilation raises."""
    tp, few = Alone(rank, ranks), _few_layers(spec)
    ops = triton_ops()
    with torch.inference_mode(), launches(facts, jobs=len(os.sched_getaffinity(0))):
        state = State(rows, max_length, META)
        pools = kv.allocate(1, few, Shard(few, rank, ranks), dtype, META)
        runner = ModelRunner(Decoder(few, weights.outline(few, dtype, tp), ops, tp), pools, state, ops, tp, budget)
        runner.graphs.begin(lambda work: work, [])
        for size in sizes(rows, budget):
            runner.graphs.capture(size)


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


def _few_layers(spec: DecoderSpec) -> DecoderSpec:
    """As many of the first layers as it takes to see every kind of them."""
    kinds = [spec.reach(layer) for layer in range(spec.layers)]
    return dataclasses.replace(spec, layers=max(kinds.index(kind) for kind in set(kinds)) + 1)
