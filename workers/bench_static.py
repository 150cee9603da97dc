"""How long one step takes on the device, without a server: python -m aiollm bench static

A model of dummy weights, a fixed batch, one step of it: the whole as a CUDA graph and launched by Python, then each
kind of operation alone. The floor of a kind is the larger of two times, its fewest bytes at the bandwidth of a copy and
its operations at the rate of a large product, both measured in this run. The attention of layers with a window is a
kind of its own, whose floor counts what the window shows.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aiollm.kernels import measure
from aiollm.kernels.batch import Batch, Sampling
from aiollm.kernels.ops import Ops, triton_ops
from aiollm.workers import weights
from aiollm.workers.families.registry import describe
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.runner import Pools
from aiollm.workers.shapes import SHAPES
from aiollm.workers.tp import TensorParallel

BIASED = 4  # biased tokens of a sequence where every parameter is on
WINDOWED = "windowed"  # the attention of layers with a sliding window


class Workload(NamedTuple):
    """One step: `rows` sequences of `cached` tokens that bring `new` ones each, and maybe a prompt besides."""

    rows: int
    cached: int
    new: int
    prompt: int = 0

    @property
    def label(self) -> str:
        if self.prompt:
            return f"mixed {self.rows} x {self.cached} + {self.prompt}"
        return f"decode {self.rows} x {self.cached}" if self.new == 1 else f"prefill {self.rows} x {self.new}"

    @property
    def sequences(self) -> int:
        return self.rows + (self.prompt > 0)

    @property
    def tokens(self) -> int:
        """New ones."""
        return self.rows * self.new + self.prompt


class Kind(NamedTuple):
    """What one kind of operation costs in a step; times in microseconds."""

    name: str
    calls: int
    us: float
    bytes: int
    flops: int
    floor_us: float


DRAWING = ("plain", "top_p", "all")


class Call(NamedTuple):
    kind: str
    work: Callable[[], Any]


def parse(text: str, new: bool) -> Workload:
    """`256x320` -> rows and tokens. Errors: ValueError."""
    rows, _, tokens = text.partition("x")
    if not (rows.isdigit() and tokens.isdigit() and int(rows) and int(tokens)):
        raise ValueError(f"{text!r} is not ROWSxTOKENS, as in 256x320")
    return Workload(int(rows), 0, int(tokens)) if new else Workload(int(rows), int(tokens), 1)


def parse_mixed(text: str) -> Workload:
    """`96x1024+2048` -> rows, tokens and a prompt. Errors: ValueError."""
    decode, _, prompt = text.partition("+")
    if not (prompt.isdigit() and int(prompt) > 1):
        raise ValueError(f"{text!r} is not ROWSxTOKENS+PROMPT, as in 96x1024+2048")
    return parse(decode, False)._replace(prompt=int(prompt))


class Bench:
    """A model on the device, and what a step of it needs."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        self.spec, self.dtype, self.device, self.ops = spec, dtype, device, ops
        self.weights = weights.dummy(spec, dtype=dtype, device=device, tp=TensorParallel())

    def step(self, load: Workload, drawing: str, scattered: bool) -> tuple[Callable[[], Any], list[Call]]:
        """A function that runs the step, and its calls, noted in one run of it. `drawing` is one of DRAWING."""
        batch, tokens, pools = self._batch(load, scattered)
        sampling = self._sampling(load, tokens, drawing)
        token_rows = batch.rows.repeat_interleave(batch.starts.diff(), output_size=load.tokens)
        last = batch.starts[1:].long() - 1

        def run(ops: Ops, decoder: Decoder) -> torch.Tensor:
            ids, slots = ops.inputs(token_rows, batch.positions, tokens, batch.slot_table)
            hidden = decoder.forward(ids, batch._replace(slots=slots), pools)
            drawn = ops.sample(decoder.logits(hidden if load.tokens == load.rows else hidden[last]), sampling)
            ops.store(tokens, sampling.rows, sampling.lengths, drawn.tokens)
            return drawn.tokens

        calls: list[Call] = []
        noting = self._noting(calls)
        run(noting, Decoder(self.spec, self.weights, noting, TensorParallel()))
        return partial(run, self.ops, Decoder(self.spec, self.weights, self.ops, TensorParallel())), calls

    def _batch(self, load: Workload, scattered: bool) -> tuple[Batch, torch.Tensor, Pools]:
        """The batch, the token table, the pools. Slots are a permutation of all, or one run for each row."""
        cached = load.cached + (load.new if load.new > 1 else 0)  # of a decoding row the last token is cached now
        length = max(cached, load.prompt)
        used = load.rows * cached + load.prompt
        order = torch.randperm(used, device=self.device) if scattered else torch.arange(used, device=self.device)
        table = torch.zeros((load.sequences, length), device=self.device, dtype=torch.int32)
        table[: load.rows, :cached] = order[: load.rows * cached].view(load.rows, cached)
        at = torch.arange(cached - load.new, cached, device=self.device).repeat(load.rows)
        starts = [load.new * i for i in range(load.rows + 1)]
        lengths = [cached] * load.rows
        if load.prompt:
            table[-1, : load.prompt] = order[load.rows * cached :]
            at = torch.cat([at, torch.arange(load.prompt, device=self.device)])
            starts.append(load.tokens)
            lengths.append(load.prompt)
        batch = Batch(
            rows=torch.arange(load.sequences, device=self.device),
            starts=torch.tensor(starts, device=self.device, dtype=torch.int32),
            lengths=torch.tensor(lengths, device=self.device, dtype=torch.int32),
            positions=at,
            slots=at,
            slot_table=table,
            max_new=max(load.new, load.prompt),
            max_length=length,
        )
        tokens = torch.randint(self.spec.vocab, (load.sequences, length + 1), device=self.device, dtype=torch.int32)
        shape = (used + 1, self.spec.kv_heads, self.spec.head_dim)

        def pool() -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        pools = [(pool(), pool()) for _ in range(self.spec.layers)]
        return batch, tokens, pools

    def _sampling(self, load: Workload, tokens: torch.Tensor, drawing: str) -> Sampling:
        n, device, everything = load.sequences, self.device, drawing == "all"
        length, words = tokens.shape[1] - 1, -(-self.spec.vocab // 32)

        def column(plain: float, on: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((n,), on if everything else plain, device=device, dtype=dtype)

        entries = BIASED if everything else 0
        no_lines = torch.full((n,), -1, dtype=torch.int32, device=device)
        return Sampling(
            rows=torch.arange(n, device=device),
            lengths=torch.full((n,), length, device=device),
            temperature=column(1.0, 0.8),
            top_p=torch.full((n,), 1.0 if drawing == "plain" else 0.9, device=device),
            top_k=column(0, 50, torch.int32),
            min_p=column(0.0, 0.02),
            presence=column(0.0, 0.5),
            frequency=column(0.0, 0.5),
            repetition=column(1.0, 1.1),
            seeds=torch.arange(n, device=device),
            prompt_lengths=torch.full((n,), length // 2, device=device),
            tokens=tokens,
            bias_starts=torch.arange(n + 1, device=device, dtype=torch.int32) * entries,
            bias_ids=torch.randint(self.spec.vocab, (n * entries,), device=device),
            bias_values=torch.randn(n * entries, device=device),
            # Every other id, so that no row is left without one that the bias and penalties spare.
            masks=torch.full((n if everything else 0, words), 0x55555555, dtype=torch.int32, device=device),
            mask_lines=torch.arange(n, dtype=torch.int32, device=device) if everything else no_lines,
            top_n=5 if everything else 0,
        )

    def _noting(self, calls: list[Call]) -> Ops:
        """The operations, each of which adds what it was called with to `calls`."""
        names = {
            weight.data_ptr(): name.rsplit(".", 1)[-1]
            for name, weight in self.weights.items()
            if isinstance(weight, torch.Tensor)
        }

        def noting(field: str) -> Callable[..., Any]:
            operation = getattr(self.ops, field)

            def call(*args: Any, **kwargs: Any) -> Any:
                kind = names[args[1].data_ptr()] if field in ("linear", "gated_linear") else field
                if field == "attention" and args[4].window:
                    kind = WINDOWED
                calls.append(Call(kind, partial(operation, *args, **kwargs)))
                return operation(*args, **kwargs)

            return call

        return Ops(*map(noting, Ops._fields))

    def cost(self, kind: str, load: Workload) -> tuple[int, int]:
        """The fewest bytes and the operations of all calls of one kind in a step."""
        spec, size = self.spec, self.dtype.itemsize
        tokens, sequences, layers = load.tokens, load.sequences, spec.layers
        q, both = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        products = {
            "qkv": (spec.hidden, q + both), "o": (q, spec.hidden), "gate_up": (spec.hidden, 2 * spec.intermediate),
            "down": (spec.intermediate, spec.hidden),
        }  # fmt: skip
        if kind in products:
            n_in, n_out = products[kind]
            moved = n_in * n_out + tokens * (n_in + n_out)
            return layers * moved * size, layers * 2 * tokens * n_in * n_out
        if kind == "head":
            moved = spec.hidden * spec.vocab + sequences * (spec.hidden + spec.vocab)
            return moved * size, 2 * sequences * spec.hidden * spec.vocab
        if kind == "rotary_store":
            return layers * 2 * tokens * (q + both) * size, 0
        if kind in ("attention", WINDOWED):
            reaches = [reach for _, reach in map(spec.reach, range(layers)) if (reach > 0) == (kind == WINDOWED)]
            window = reaches[0] if reaches and reaches[0] else spec.max_position
            cached = load.cached + (load.new if load.new > 1 else 0)
            seen, pairs = min(cached, window), _pairs(load.prompt, window)
            pairs += load.rows * (seen if load.new == 1 else _pairs(load.new, window))
            read = load.rows * (seen if load.new == 1 else cached) + load.prompt
            moved = read * both + 2 * tokens * q
            return len(reaches) * moved * size, len(reaches) * 4 * pairs * q
        if kind == "sample":
            return sequences * spec.vocab * size, 0
        return 2 * tokens * spec.hidden * size if kind == "embedding" else 0, 0


def _pairs(tokens: int, window: int) -> int:
    """Of a query and a key that it sees, in a prompt of so many tokens."""
    hidden = max(0, tokens - window)
    return tokens * (tokens + 1) // 2 - hidden * (hidden + 1) // 2


def replay_us(work: Callable[[], Any], replays: int) -> float:
    """Median time of `work` as a CUDA graph in microseconds."""
    torch.cuda.empty_cache()  # a graph takes its memory apart, and leaves it to nobody
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return statistics.median(measure.event_us(graph.replay, replays))


def report(bench: Bench, load: Workload, options: argparse.Namespace, ceilings: measure.Ceilings) -> dict[str, Any]:
    """Time one workload and print its table."""
    gc.collect()  # the pools of the workload before are part of a cycle
    step, calls = bench.step(load, options.sampling, options.slots == "scattered")
    graph_us, eager_us = replay_us(step, options.repeats), statistics.median(measure.event_us(step, options.repeats))
    rate = load.tokens / graph_us * 1e6
    print(f"\n{load.label}: {graph_us / 1e3:.3f} ms as a graph, {eager_us / 1e3:.3f} ms eager, {rate:,.0f} tok/s")
    print(f"{'kind':14} {'calls':>5} {'ms':>9} {'GB':>8} {'TFLOP':>8} {'floor ms':>9} {'share':>6}")
    kinds = []
    for name in dict.fromkeys(call.kind for call in calls):
        chosen = [call.work for call in calls if call.kind == name]
        us = replay_us(lambda chosen=chosen: [work() for work in chosen], options.repeats)  # type: ignore[misc]
        moved, flops = bench.cost(name, load)
        floor = max(moved / ceilings.copy, flops / ceilings.matmul) * 1e6
        kinds.append(Kind(name, len(chosen), us, moved, flops, floor))
        print(
            f"{name:14} {len(chosen):5} {us / 1e3:9.3f} {moved / 1e9:8.3f} {flops / 1e12:8.3f} {floor / 1e3:9.3f}"
            f" {floor / us:6.0%}"
        )
    total, floor = sum(kind.us for kind in kinds), sum(kind.floor_us for kind in kinds)
    print(
        f"{'sum':14} {len(calls):5} {total / 1e3:9.3f} {'':17} {floor / 1e3:9.3f} {floor / graph_us:6.0%} of the graph"
    )
    return {
        "workload": load.label, "graph_us": graph_us, "eager_us": eager_us, "tokens_per_second": rate,
        "kinds": [kind._asdict() for kind in kinds],
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="aiollm bench static", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "--model", default="qwen3-8b", help=f"{', '.join(SHAPES)}, or a folder with a config.json (%(default)s)"
    )
    parser.add_argument(
        "--decode", nargs="*", default=["1x320", "256x320", "1024x192"], metavar="ROWSxTOKENS",
        help="steps of one token for each row, at that many tokens of context (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", nargs="*", default=["1x8192", "2x4096"], metavar="ROWSxTOKENS",
        help="steps that compute prompts of so many tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixed", nargs="*", default=["96x1024+2048"], metavar="ROWSxTOKENS+PROMPT",
        help="steps of one token for each row and of a prompt besides (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sampling", choices=DRAWING, default="plain",
        help="top_p: 0.9 alone, which leaves most tokens of dummy weights; all: every parameter and a mask",
    )  # fmt: skip
    parser.add_argument(
        "--slots", choices=["scattered", "runs"], default="scattered", help="where tokens lie in the pool (scattered)"
    )
    parser.add_argument("--data_type", choices=["bf16", "fp16"], default="bf16", help="of weights and KV cache (bf16)")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median counts, 1 or more (20)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(argv)
    try:
        loads = [parse(text, False) for text in options.decode] + [parse(text, True) for text in options.prefill]
        loads += [parse_mixed(text) for text in options.mixed]
        config = SHAPES.get(options.model) or json.loads((Path(options.model) / "config.json").read_bytes())
        spec = describe(config)[0]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed, and none is visible")
    device = torch.device("cuda")
    facts = measure.facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with torch.inference_mode():
        ceilings = measure.ceilings(device)
        print(f"copy {ceilings.copy / 1e12:.2f} TB/s, bf16 product {ceilings.matmul / 1e12:.0f} TFLOP/s", flush=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.data_type]
        bench = Bench(spec, dtype, device, triton_ops())
        steps = [report(bench, load, options, ceilings) for load in loads]
    if options.save:
        content = {
            **facts, "model": options.model, "sampling": options.sampling, "slots": options.slots,
            "data_type": options.data_type, "ceilings": ceilings._asdict(), "steps": steps,
        }  # fmt: skip
        options.save.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
