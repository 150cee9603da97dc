"""Greedy tokens do not depend on the batch, nor on graphs, but where rounding may swap two of them.

Kernels are chosen by the number of rows, graphs pad it, and where decode attention cuts a sequence depends on the
others (kernels/plan.py): so sums are rounded differently. Alone and in a full batch, with graphs and without, each
token must be the likeliest to transformers in fp32, on the same weights and behind the same tokens, or its logit so
near to that one's that errors which the table of tolerances allows may swap the two. On a CPU 1.7 % of the tokens are
swapped in bf16, whose logits are at most 0.012 of the largest apart, where 0.064 is allowed; in fp32 none.

A step that fills its graph launches the same kernels on the same sizes without it, and no sum depends on who comes
first: such steps are equal bit for bit.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from likeliest import assert_likeliest
from serving import Server
from steps import run
from tiny_model import in_fp32, write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from updates import begin

from aiollm.kernels.tolerance import TOLERANCE
from aiollm.trace import read
from aiollm.wire.messages import WorkerSettings
from aiollm.workers.flight import Outcome
from aiollm.workers.load import load, stream_of
from aiollm.workers.runner import ModelRunner
from aiollm.workers.sizes import Draw, Forward, sizes

# In bf16 Hopper's own kernels take these sizes: prompts are attended to beside the rows that decode.
LAYERS = 2
MODEL = {
    "num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1, "vocab_size": VOCAB_SIZE,
}  # fmt: skip
CONTEXT, CHUNKS, CHUNK, DECODES = 250, 20, 9, 20  # of the steps that fill their graphs; lengths in tokens
SWAPPED = {torch.float32: 0.001, torch.bfloat16: 0.05}  # the most tokens, as a share, that are not the likeliest


class Size(NamedTuple):
    rows: int
    budget: int  # prompt tokens of a step
    output: int  # tokens; the first row has some left when the last prompt is computed


CPU, GPU = Size(24, 256, 16), Size(256, 1024, 120)


class Setting(NamedTuple):
    size: Size
    flags: tuple[str, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights are bf16 numbers, so that they are the same in either type."""
    return write_byte_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, **MODEL))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    torch.set_num_threads(1)  # a tiny model is not faster with more
    return in_fp32(folder)


@pytest.mark.parametrize("dtype", SWAPPED, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(Setting(CPU, ("--device", "cpu", "--threads", "1")), id="cpu"),
        pytest.param(Setting(GPU, ("--device", "cuda")), id="graphs", marks=pytest.mark.gpu),
        pytest.param(Setting(GPU, ("--device", "cuda", "--disable_cudagraph")), id="eager", marks=pytest.mark.gpu),
    ],
)
def test_alone_and_in_a_full_batch_tokens_are_the_likeliest(
    setting: Setting,
    dtype: torch.dtype,
    folder: Path,
    model: Any,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    size, trace = setting.size, tmp_path / "trace.json"
    flags = (
        "--data_type", {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], "--max_total_token_num", "60000",
        "--running_max_req_size", str(size.rows), "--batch_max_tokens", str(size.budget),
        "--chunked_prefill_size", "64", "--gap_target", "0", "--disable_dynamic_prompt_cache", "--trace", str(trace),
    )  # fmt: skip
    prompts = [[(7 * i + n) % 251 for i in range(1 + 11 * n % 150)] for n in range(size.rows)]
    with Server("--model_dir", str(folder), *flags, *setting.flags) as server:
        alone = [(prompt, *complete(server, [prompt], size.output)) for prompt in prompts[::8]]
        together = list(zip(prompts, complete(server, prompts, size.output), strict=True))
    iterations = read(trace)
    assert any(i.rows == size.rows and not i.chunk_tokens for i in iterations), "never did all rows decode"
    assert any(i.rows > size.rows // 2 and i.chunk_tokens for i in iterations), "no prompt beside many rows"

    bound = 2 * TOLERANCE[dtype][0] * math.sqrt(2 * LAYERS)  # two logits, errors of as many chains: test_half_precision
    swapped = [assert_likeliest(model, prompt, output, bound) for prompt, output in alone + together]
    record_property(
        "not the likeliest",
        f"{sum(swapped[: len(alone)])} of {size.output * len(alone)} tokens alone,"
        f" {sum(swapped[len(alone) :])} of {size.output * len(together)} together",
    )
    assert sum(swapped) <= SWAPPED[dtype] * size.output * len(swapped)


def complete(server: Server, prompts: list[list[int]], count: int) -> list[list[int]]:
    """So many greedy tokens behind each of the prompts, which come in one request."""
    body = {"prompt": prompts, "max_tokens": count, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    return [choice["token_ids"] for choice in server.post("/v1/completions", body)["choices"]]


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), pytest.param("cuda", 256, marks=pytest.mark.gpu)])
def test_steps_that_fill_their_graphs_are_the_same_bit_for_bit(device: str, rows: int, folder: Path) -> None:
    settings = WorkerSettings(
        folder=str(folder), data_type="bf16", device=device, rows=rows, slots=rows * CONTEXT, threads=1,
        max_length=CONTEXT, chunk_budget=rows,
    )  # fmt: skip
    stream = stream_of(settings)
    with stream.context(), torch.inference_mode():
        graphs, eager = (
            load(msgspec.structs.replace(settings, graphs=on), lambda _: None).runner for on in (True, False)
        )
        if device == "cpu":  # a graph is its work there, done again
            graphs.graphs.begin(lambda work: work, sizes(rows, rows))
            while graphs.prepares:
                graphs.prepare()
        filled = [Forward(True, 2 * rows, rows), Forward(False, rows, rows), Draw(0, rows), Draw(0, rows - rows // 8)]
        assert graphs.graphs._replays.keys() >= set(filled) and not len(eager.graphs)
        pendings = [stream.launch(partial(story, runner, rows)) for runner in (graphs, eager)]
        for pending in pendings:
            pending.wait()
            assert pending.error is None
        for ours, theirs in zip(*(pending.result for pending in pendings), strict=True):
            assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.logprobs, theirs.logprobs)
        for (k, v), (other_k, other_v) in zip(graphs.kv, eager.kv, strict=True):
            assert torch.equal(k[:-1], other_k[:-1]) and torch.equal(v[:-1], other_v[:-1])
    stream.close()


def story(runner: ModelRunner, rows: int) -> list[Outcome]:
    """Most rows decode from the first step on, beside chunks of the others' prompts; then all do."""
    most, few = rows - rows // 8, rows // 8
    updates = []
    for row in range(rows):
        prompt = [(7 * i + row) % 251 for i in range(1 if row < most else CHUNKS * CHUNK)]
        updates.append(begin(row + 1, row, prompt, first_slot=row * CONTEXT, credit=CONTEXT - len(prompt)))
    counts, ones = np.repeat([1, CHUNK], [most, few]), np.ones(rows, np.int64)
    steps = [(counts, most)] * (CHUNKS - 1) + [(counts, rows)] + [(ones, rows)] * DECODES
    outcomes, lengths = [], 0 * ones
    for counts, sampled in steps:
        outcomes.append(run(runner, range(rows), lengths, counts, range(sampled), updates))
        lengths, updates = lengths + counts, []
    return outcomes
