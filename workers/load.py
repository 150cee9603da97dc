"""From settings to a runner: read the model, measure the memory, warm up, say what was found."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aiollm.kernels.cpu.quantize import exact
from aiollm.kernels.device import facts
from aiollm.kernels.ops import Ops, cpu_ops, triton_ops
from aiollm.wire.messages import Loading, Ready, WorkerSettings
from aiollm.workers import fit, gpu, kv, memory, weights
from aiollm.workers.families.registry import describe
from aiollm.workers.groups import lifetimes
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.model.reward import read_score
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import TOP, sizes
from aiollm.workers.staging import Staging
from aiollm.workers.state import State
from aiollm.workers.step import NO_BIAS, Room, Step, columns
from aiollm.workers.stream import HostStream, Stream
from aiollm.workers.tp import Shard, TensorParallel
from aiollm.workers.windows import Windows, ring

# Of the KV cache and of all weights, but that `int8` holds those of the linear layers as 8-bit integers.
DATA_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


class Phases:
    """Seconds of each phase of the start, and news of them."""

    def __init__(self, tell: Callable[[Loading], None]) -> None:
        self.seconds: list[tuple[str, float]] = []
        self.running = ""
        self._tell = tell

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float], None]]:
        """Time a phase; the value is called with the fraction that is done, and passes on a few of them a second."""
        began = told = time.monotonic()
        self.running = name
        self._tell(Loading(name, 0.0))

        def progress(fraction: float) -> None:
            nonlocal told
            if time.monotonic() - told > 0.2:
                told = time.monotonic()
                self._tell(Loading(name, fraction))

        yield progress
        self.seconds.append((name, round(time.monotonic() - began, 3)))
        self.running = ""


class Loaded(NamedTuple):
    """A model that can run, and what is said of it."""

    runner: ModelRunner
    ready: Ready


def device_of(settings: WorkerSettings) -> torch.device:
    """Each rank of a group has a GPU of its own."""
    device = torch.device(settings.device)
    return torch.device("cuda", settings.rank) if device.type == "cuda" and device.index is None else device


def stream_of(settings: WorkerSettings) -> Stream:
    """Where the steps of a worker run. Raises ValueError where its device cannot be used."""
    device = device_of(settings)
    if device.type == "cpu":
        return HostStream(torch.inference_mode)
    gpu.check(device)
    return gpu.CudaStream(device)


def load(settings: WorkerSettings, tell: Callable[[Loading], None]) -> Loaded:
    """Within the context of the stream that steps will run on.

    Raises ValueError or MemoryError with a sentence for the user where the model cannot be served as asked.
    """
    phases = Phases(tell)
    device = device_of(settings)
    try:
        return _load(settings, device, phases)
    except RuntimeError as error:
        if not fit.ran_out(error):
            raise
        phase = phases.running or "preparing the model"
        raise MemoryError(fit.exhausted(phase, on_gpu=device.type == "cuda")) from error


def _load(settings: WorkerSettings, device: torch.device, phases: Phases) -> Loaded:
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.ranks))
    with phases.phase("meeting the other ranks" if settings.ranks > 1 else "reading the configuration"):
        tp = TensorParallel.join(settings.rank, settings.ranks, Path(settings.rendezvous), device)
        config = _config(Path(settings.folder) / "config.json")
        spec, names, unread = describe(config)
        shard = Shard(spec, tp.rank, tp.size)
    data_type = _data_type(settings.data_type, device, config)
    dtype, ops = DATA_TYPES[data_type], _ops(device)
    if spec.reward:
        ops = ops._replace(sample=read_score)
    quantize = ops.quantize if data_type == "int8" else None
    longest = min(settings.max_length or spec.max_position, spec.max_position)
    groups = lifetimes(spec)  # of nothing else: a worker that starts again has to find the slots of the first one
    longest = min(longest, settings.slots * groups.each + 1) if settings.slots else longest
    # LongRoPE chooses its factors by the length that is served: what does not fit in the pool is no context.
    served = replace(spec, max_position=longest)
    per_slot = kv.bytes_per_slot(spec, shard, dtype, groups)
    if not settings.again:
        _check(settings, spec, data_type, device, tp, longest, per_slot * groups.each)
    every = sizes(settings.rows, settings.chunk_budget, min(TOP, spec.vocab))
    compiled = None
    if device.type == "cuda":
        _tune(spec, shard, dtype, device, phases)
        from aiollm.workers.compiling import Server, compile_ahead, meanwhile  # Triton, which CPUs do without

        server = Server(
            spec, dtype, ops, tp.rank, tp.size, settings.rows, longest, settings.chunk_budget, every
        )  # fmt: skip
        compiled = meanwhile(lambda: compile_ahead(server, facts(device)))
    with phases.phase("loading weights") as progress:
        if settings.load_format == "dummy":
            parameters = weights.dummy(spec, dtype=dtype, device=device, tp=tp, quantize=quantize)
        else:
            parameters = weights.load(
                Path(settings.folder), spec, names,
                dtype=dtype, device=device, tp=tp, quantize=quantize, progress=progress,
            )  # fmt: skip
    if compiled is not None:
        with phases.phase("compiling kernels"):
            compiled()
    decoder = Decoder(served, parameters, ops, tp, [group for group, _ in groups.places])
    state = _state(settings, spec, longest, device)

    def runner_with(slots: int) -> ModelRunner:
        state.pad_into(slots)
        return ModelRunner(
            decoder, kv.allocate(slots, spec, shard, dtype, device, groups), state, ops, tp, settings.chunk_budget
        )

    budget = [("weights", weights.stored_bytes(parameters)), ("row tables", state.nbytes)]
    if device.type == "cuda":
        with phases.phase("measuring memory"):
            budget += memory.measured(lambda: runner_with(1), every, settings.graphs)
    with phases.phase("allocating the KV cache"):
        reserved = sum(amount for what, amount in budget if what in memory.RESERVED)
        tokens = _tokens(settings, per_slot * groups.each, device, reserved, tp)
        slots = tokens * groups.each
        runner = runner_with(slots)
    with phases.phase("warming up"), torch.inference_mode():
        runner.run(_warm_up(settings.rows))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what goes wrong there shows only now
    if device.type == "cuda" and settings.graphs:
        with phases.phase("capturing graphs") as progress:
            memory.capture(runner, every, progress, tokens, per_slot * groups.each)
    return Loaded(runner, Ready(
        slots=tokens,
        max_length=min(longest, slots + 1),
        vocabulary=spec.vocab,
        hidden=spec.hidden,
        architecture=config["architectures"][0],
        data_type=data_type,
        budget=[*budget, ("KV cache", per_slot * (slots + 1))],
        seconds=phases.seconds,
        unread=unread,
        scores=spec.reward is not None,
        window=groups.window,
        windowed=groups.each - 1,
        score_token=-1 if spec.reward_token is None else spec.reward_token,
    ))  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def _state(settings: WorkerSettings, spec: DecoderSpec, longest: int, device: torch.device) -> State:
    groups = lifetimes(spec)
    columns = ring(groups.window, settings.chunk_budget)
    windows = Windows(groups.each - 1, groups.window, settings.rows, columns, device)
    return State(settings.rows, longest, device, windows, spec.vocab)


def _check(
    settings: WorkerSettings,
    spec: DecoderSpec,
    data_type: str,
    device: torch.device,
    tp: TensorParallel,
    longest: int,
    per_token: int,
) -> None:
    """Raises MemoryError where weights, row tables and KV cache are sure not to fit: nothing of them is made yet."""
    tables = _state(settings, spec, longest, torch.device("meta")).nbytes
    outline = weights.outline(spec, DATA_TYPES[data_type], tp, data_type == "int8")
    stored = weights.stored_bytes(outline)
    on_gpu = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if on_gpu else (kv.obtainable_memory(swap=True),) * 2
    # The fraction counts where the KV cache takes what is left; who asks for a size gets a token at least.
    fraction = settings.mem_fraction if on_gpu and not settings.slots else 1.0
    cache = kv.least(min(1, settings.slots), per_token, device)
    fit.check(stored, tables, cache, free, total, on_gpu=on_gpu, data_type=data_type, fraction=fraction)
    if settings.slots:
        beside = f" beside weights of {fit.gib(stored)} ({data_type})"
        _asked(settings, per_token, device, stored + tables, tp, beside)


def _tokens(settings: WorkerSettings, per_token: int, device: torch.device, reserved: int, tp: TensorParallel) -> int:
    """Tokens of the KV cache, the same on all ranks. Raises MemoryError where they do not fit."""
    if settings.again:
        return settings.slots
    if not settings.slots:
        return tp.smallest(kv.fitting(per_token, device, settings.mem_fraction, reserved))
    return _asked(settings, per_token, device, reserved, tp)


def _asked(
    settings: WorkerSettings, per_token: int, device: torch.device, reserved: int, tp: TensorParallel, beside: str = ""
) -> int:
    """The tokens that were asked for, where they fit; `beside` says what of the `reserved` bytes is not loaded yet."""
    # Who asks for a size may have more than mem_fraction, which says what is taken unasked.
    fits, advised = (
        tp.smallest(kv.most(per_token, device, share, reserved, tp.size, swap=bool(beside)))
        for share in (1.0, settings.mem_fraction)
    )
    return fit.granted(settings.slots, fits, advised, beside)


def _ops(device: torch.device) -> Ops:
    return cpu_ops() if device.type == "cpu" else triton_ops()


def _tune(spec: DecoderSpec, shard: Shard, dtype: torch.dtype, device: torch.device, phases: Phases) -> None:
    """As $AIOLLM_TRITON_AUTOTUNE_LEVEL says, while the memory is still free."""
    from aiollm.kernels import tuned
    from aiollm.kernels.autotune import at_start
    from aiollm.kernels.workload import Shape

    if tuned.level() not in (1, 2):
        return
    shape = Shape(
        spec.hidden, spec.layers, shard.heads, shard.kv_heads, spec.head_dim, shard.intermediate, shard.vocab, dtype
    )
    with phases.phase("tuning kernels") as progress, torch.cuda.device(device):
        at_start(shape, lambda _, done: progress(done))


def _data_type(name: str, device: torch.device, config: dict[str, object]) -> str:
    """`auto` is int8 on a CPU that computes with it exactly, fp32 on others, and the checkpoint's own type on a GPU."""
    on_cpu = device.type == "cpu"
    if name == "int8" and not (on_cpu and exact()):
        raise ValueError(f"data_type int8 is for CPUs with AVX-512 VNNI, and this is {'another' if on_cpu else device}")
    if name != "auto":
        return name
    if on_cpu:
        return "int8" if exact() else "fp32"
    own = config.get("dtype") or config.get("torch_dtype")
    return "fp16" if own == "float16" else "bf16"


def _warm_up(rows: int) -> Step:
    """One token in the hold row: whatever is compiled or allocated at first use, is so before Ready."""
    one, zero, room = np.ones(1, np.int64), np.zeros(1, np.int64), Room(1, 1, 1)
    return Step(
        updates=[],
        staged=Staging().put(columns(rows * one, zero, one, zero, NO_BIAS, room, rows)),
        room=room,
        sampled=1,
        max_new=1,
        max_length=1,
        top_n=0,
        prompts=[],
    )
