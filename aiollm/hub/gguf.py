"""GGUF file -> Hugging Face folder: config.json, model.safetensors, tokenizer files, generation_config.json.

Tensors are streamed in blocks of rows, so memory stays at some tens of MiB whatever the size of the model. Quantised
tensors are undone and rounded to float16; float16, bfloat16 and float32 ones are copied bit by bit.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiollm.hub.cache import Progress
from aiollm.hub.errors import HubError
from aiollm.hub.gguf_config import LONG, ROPE_FACTORS, SHORT, Numbers, common
from aiollm.hub.gguf_families import FAMILIES, Family

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiollm.hub.gguf_file import GgufFile, GgufTensor

BLOCK_ELEMENTS = 1 << 21  # elements converted at a time: 8 MiB as float32
AS_THEY_ARE = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of an element
IGNORED = frozenset({ROPE_FACTORS, SHORT, LONG})  # they are part of the configuration


class Run(NamedTuple):
    """Neighbouring rows of a tensor; a vector's elements count as rows."""

    source: "GgufTensor"
    first: int
    rows: int
    head: int = 0  # rows of one head, where llama.cpp has put pairs side by side


@dataclass(frozen=True)
class Weight:
    """One tensor on its way."""

    name: str  # in the Hugging Face folder
    shape: tuple[int, ...]
    dtype: str  # on disk, as safetensors calls it: F32, F16, BF16
    runs: tuple[Run, ...]
    offset: float = 0.0  # that llama.cpp has added

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * AS_THEY_ARE[self.dtype]


def convert(path: Path, folder: Path, progress: Progress, check: Callable[[Path], None] = lambda folder: None) -> None:
    """Converts the GGUF file `path` into the existing, empty `folder`.

    Supported: the architectures of `gguf_families` in one file, with every quantisation that the `gguf` package can
    undo. Errors: HubError for a damaged file and for all that has no exact counterpart (architecture, rope, tokenizer);
    what `check` raises, which is given the folder before there are weights in it.
    """
    from aiollm.hub.gguf_file import GgufFile
    from aiollm.hub.gguf_tokenizer import end_tokens, write_tokenizer

    with GgufFile(path) as source:
        fields = source.fields
        numbers, config, weights = _plan(source)
        ends = end_tokens(fields)
        starts = fields.get("tokenizer.ggml.bos_token_id")
        if ends:
            config["eos_token_id"] = ends[0]
        if starts is not None:
            config["bos_token_id"] = starts
        generation = {"bos_token_id": starts, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation)
        write_tokenizer(fields, folder, numbers.context)
        check(folder)
        _write_weights(folder / "model.safetensors", source, weights, progress)


def check_gguf(path: Path) -> None:
    """Errors: HubError, as in `convert`, for what shows before the tokenizer and the weights are read."""
    from aiollm.hub.gguf_file import GgufFile

    with GgufFile(path) as source:
        _plan(source)


def _plan(source: "GgufFile") -> tuple[Numbers, dict[str, Any], list[Weight]]:
    """The hyper-parameters, the config.json without token ids, and all tensors."""
    fields, name = source.fields, source.path.name
    if fields.get("split.count", 1) > 1:
        parts = fields["split.count"]
        raise HubError(f"{name} is one of {parts} parts: join them with llama-gguf-split --merge")
    numbers, family = _family(source)
    config = make_config(numbers, family)
    tokens = len(fields.get("tokenizer.ggml.tokens", []))
    if tokens > numbers.vocab:
        raise HubError(f"{name} names {tokens} tokens, but only {numbers.vocab} have an embedding")
    weights = plan_weights(numbers, family)
    config["dtype"] = _common_dtype(weights)
    return numbers, config, weights


def make_config(numbers: Numbers, family: Family) -> dict[str, Any]:
    """The config.json of a file, without dtype and token ids. Errors: HubError, as in `convert`."""
    architecture = family.architecture if isinstance(family.architecture, str) else family.architecture(numbers)
    own = family.config(numbers)
    shared = common(numbers, "partial_rotary_factor" not in own) if family.common else {}
    return {"architectures": [architecture], **shared, **own}


def plan_weights(numbers: Numbers, family: Family) -> list[Weight]:
    """All tensors under their Hugging Face names.

    Errors: HubError when a layer has not what the first one has, or a tensor has the wrong shape or no place.
    """
    source, name = numbers.source, numbers.source.path.name
    layers = min(numbers.layers, len(source.tensors))  # a damaged file may claim billions
    parts = [each.removeprefix("blk.0.") for each in source.tensors if each.startswith("blk.0.")]
    top = [each for each in source.tensors if each.rpartition(".")[0] in family.top]
    wanted = {*top, *(f"blk.{i}.{part}" for i in range(layers) for part in parts)}
    wanted |= {"token_embd.weight", "output_norm.weight"}
    present = source.tensors.keys() - IGNORED
    unknown = {each for each in present if each.split(".")[-2] not in {**family.layer, **family.top}}
    for problem, odd in (("misses", wanted - present), ("has the unexpected", (present - wanted) | unknown)):
        if odd:
            raise HubError(f"{name} ({numbers.architecture}) {problem} tensor {min(odd)} (of {len(odd)} such)")
    shapes = _shapes(numbers, family)
    for each in filter(present.__contains__, source.tensors):
        tensor, kind = source.tensors[each], each.split(".")[-2]
        expected = [shape[:1] for shape in shapes[kind]] if each.endswith(".bias") else shapes[kind]
        if tensor.shape not in expected:
            raise HubError(f"{name}: tensor {each} has shape {list(tensor.shape)}, not {list(expected[0])}")
    found = [weight for i in range(layers) for weight in _layer(numbers, family, i, parts)]
    for each in top:
        part, _, kind = each.rpartition(".")
        offset = family.norm_offset if part.endswith("norm") else 0.0
        found.append(_weight(f"{family.top[part]}.{kind}", [_run(source.tensors[each])], offset))
    return found


def _family(source: "GgufFile") -> tuple[Numbers, Family]:
    architecture = source.fields.get("general.architecture")
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise HubError(f"{source.path.name}: the GGUF architecture {architecture!r} is not supported, only {known}")
    return Numbers(source, architecture), FAMILIES[architecture]


def _layer(numbers: Numbers, family: Family, layer: int, parts: list[str]) -> Iterator[Weight]:
    """The tensors of one layer."""
    at = family.at.format(layer)
    tensors = {part: numbers.source.tensors[f"blk.{layer}.{part}"] for part in parts}
    for part, tensor in tensors.items():
        name, _, kind = part.rpartition(".")
        if name in ("attn_q", "attn_k", "attn_v") and family.joined:
            if name == "attn_q":
                three = [_run(tensors[f"attn_{x}.{kind}"], numbers, family, x) for x in "qkv"]
                yield _weight(f"{at}{family.joined}.{kind}", three)
        elif name in ("attn_q_norm", "attn_k_norm") and family.head_norms:
            for head in range(tensor.shape[0]):
                inner = family.head_norms.format(name.split("_")[1], head)
                yield _weight(f"{at}{inner}.{kind}", [Run(tensor, head, 1)], shape=tensor.shape[1:])
        elif name == "attn_qkv" and family.by_head:
            whole, width = numbers.heads * numbers.head_dim, numbers.head_dim
            heads = [Run(tensor, x * whole + i * width, width) for i in range(numbers.heads) for x in range(3)]
            yield _weight(f"{at}{family.layer[name]}.{kind}", heads)
        else:
            offset = family.norm_offset if name.endswith("norm") else 0.0
            run = _run(tensor, numbers, family, name.removeprefix("attn_"))
            yield _weight(f"{at}{family.layer[name]}.{kind}", [run], offset)


def _run(tensor: "GgufTensor", numbers: Numbers | None = None, family: Family | None = None, part: str = "") -> Run:
    """All of a tensor."""
    pairs = numbers is not None and family is not None and family.interleaved and part in ("q", "k")
    return Run(tensor, 0, tensor.rows, numbers.head_dim if pairs and numbers else 0)


def _weight(name: str, runs: list[Run], offset: float = 0.0, shape: tuple[int, ...] | None = None) -> Weight:
    kind = runs[0].source.type.name
    dtype = "F32" if offset else kind if kind in AS_THEY_ARE else "F16"
    rows = sum(run.rows for run in runs)
    return Weight(name, shape or (rows, *runs[0].source.shape[1:]), dtype, tuple(runs), offset)


def _shapes(numbers: Numbers, family: Family) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that a part may have, [out, in] of each matrix; the first entry is also the length of its bias."""
    hidden, inner, head = numbers.hidden, numbers.inner, numbers.head_dim
    queries, keys = numbers.heads * head, numbers.kv_heads * head
    norms: dict[str, list[tuple[int, ...]]] = {
        part: [(hidden,)] for part in (*family.layer, *family.top) if part.endswith("norm")
    }
    return norms | {
        "token_embd": [(numbers.vocab, hidden)],
        "position_embd": [(numbers.context, hidden)],
        "output": [(numbers.vocab, hidden)],
        "attn_q_norm": [(head,), (queries,), (numbers.heads, head)],
        "attn_k_norm": [(head,), (keys,), (numbers.kv_heads, head)],
        "attn_q": [(queries, hidden)],
        "attn_k": [(keys, hidden)],
        "attn_v": [(keys, hidden)],
        "attn_qkv": [(queries + 2 * keys, hidden)],
        "attn_output": [(hidden, queries)],
        "ffn_gate": [(inner, hidden)],
        "ffn_up": [(inner * (1 + family.gate_in_up), hidden)],
        "ffn_down": [(hidden, inner)],
    }


def _common_dtype(weights: list[Weight]) -> str:
    sizes = dict.fromkeys(("F16", "BF16", "F32"), 0)
    for weight in weights:
        sizes[weight.dtype] += weight.size
    return {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[max(sizes, key=lambda dtype: sizes[dtype])]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    kept = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, source: "GgufFile", weights: list[Weight], progress: Progress) -> None:
    """A safetensors file, header first, then one tensor after the other (safetensors' own writer wants all at once)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in weights:
        offsets = [at, at + weight.size]
        header[weight.name] = {"dtype": weight.dtype, "shape": weight.shape, "data_offsets": offsets}
        at += weight.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            progress(f"converting {source.path.name}", done / at)
            for block in _blocks(source, weight):
                file.write(block.data)
            done += weight.size


def _blocks(source: "GgufFile", weight: Weight) -> Iterator["NDArray[Any]"]:
    """The weight's rows in their type on disk, some at a time."""
    import numpy as np
    from gguf.quants import dequantize

    for run in weight.runs:
        tensor = run.source
        step = max(1, BLOCK_ELEMENTS // math.prod(tensor.shape[1:]))
        step = max(run.head, step // run.head * run.head) if run.head else step
        for first in range(run.first, run.first + run.rows, step):
            count = min(step, run.first + run.rows - first)
            block: NDArray[Any] = source.read_rows(tensor, first, count)
            if weight.offset:
                block = dequantize(block, tensor.type) - np.float32(weight.offset)
            elif tensor.type.name not in AS_THEY_ARE:
                try:
                    exact = dequantize(block, tensor.type)
                except NotImplementedError:
                    raise HubError(
                        f"{source.path.name}: no way back from {tensor.type.name} of {tensor.name}"
                    ) from None
                with np.errstate(over="ignore"):
                    block = exact.astype(np.float16)
                if not np.isfinite(block).all():
                    raise HubError(f"{source.path.name}: tensor {tensor.name} holds values that float16 cannot")
            yield np.ascontiguousarray(unpermute(block, run.head) if run.head else block)


def unpermute(rows: "NDArray[Any]", head: int) -> "NDArray[Any]":
    """Rows [heads * head, n] from llama.cpp's order, pairs (i, i + head/2) side by side, back to half behind half."""
    return rows.reshape(-1, head // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
