"""GGUF file -> Hugging Face folder: config.json, model.safetensors, tokenizer files, generation_config.json.

Tensors are streamed in blocks of rows, so memory stays at some tens of MiB whatever the size of the model. Quantised
tensors are undone and rounded to float16; float16, bfloat16 and float32 ones are copied bit by bit.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiollm.hub.cache import Progress
from aiollm.hub.errors import HubError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aiollm.hub.gguf_file import GgufFile, GgufTensor

BLOCK_ELEMENTS = 1 << 21  # elements converted at a time: 8 MiB as float32

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXTRA = {"qwen3": {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}}
BIASED = {"qwen2": ("attn_q", "attn_k", "attn_v")}


@dataclass(frozen=True)
class Weight:
    """One tensor on its way."""

    name: str  # in the Hugging Face folder
    source: "GgufTensor"
    dtype: str  # on disk, as safetensors calls it: F32, F16, BF16
    head: int | None  # size of a head, for the queries and keys that llama.cpp reorders

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.source.rows * self.source.shape[-1] * (4 if self.dtype == "F32" else 2)


def convert(path: Path, folder: Path, progress: Progress) -> None:
    """Converts the GGUF file `path` into the existing, empty `folder`.

    Supported: llama, qwen2, qwen3 in one file, with every quantisation that the `gguf` package can undo.
    Errors: HubError for a damaged file and for all that has no exact counterpart (architecture, rope, tokenizer).
    """
    from aiollm.hub.gguf_config import make_config
    from aiollm.hub.gguf_file import GgufFile
    from aiollm.hub.gguf_tokenizer import end_tokens, write_tokenizer

    with GgufFile(path) as source:
        fields = source.fields
        if fields.get("split.count", 1) > 1:
            parts = fields["split.count"]
            raise HubError(f"{path.name} is one of {parts} parts: join them with llama-gguf-split --merge")
        config = make_config(source)
        tokens = len(fields.get("tokenizer.ggml.tokens", []))
        if tokens > config["vocab_size"]:
            raise HubError(f"{path.name} names {tokens} tokens, but only {config['vocab_size']} have an embedding")
        weights = plan_weights(source, config)
        config["dtype"] = _common_dtype(weights)
        ends = end_tokens(fields)
        starts = fields.get("tokenizer.ggml.bos_token_id")
        if ends:
            config["eos_token_id"] = ends[0]
        if starts is not None:
            config["bos_token_id"] = starts
        generation = {"bos_token_id": starts, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation)
        write_tokenizer(fields, folder, config["max_position_embeddings"])
        _write_weights(folder / "model.safetensors", source, weights, progress)


def plan_weights(source: "GgufFile", config: Mapping[str, Any]) -> list[Weight]:
    """All tensors under their Hugging Face names, in file order.

    Errors: HubError when one is missing, has the wrong shape, or has no place in the architecture.
    """
    family = config["model_type"]
    layers = min(config["num_hidden_layers"], len(source.tensors))  # a damaged file may claim billions
    names = _names(family, layers)
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    present = {name: tensor for name, tensor in source.tensors.items() if name != "rope_freqs.weight"}
    for problem, odd in (("misses", names.keys() - present), ("has the unexpected", present.keys() - names.keys())):
        if odd:
            raise HubError(f"{source.path.name} ({family}) {problem} tensor {min(odd)} (of {len(odd)} such)")
    shapes = _shapes(config)
    weights = []
    for name, tensor in present.items():
        part = name.split(".")[-2]
        shape = shapes[part][:1] if name.endswith(".bias") else shapes[part]
        if tensor.shape != shape:
            raise HubError(f"{source.path.name}: tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
        dtype = tensor.type.name if tensor.type.name in ("F32", "BF16") else "F16"
        head = config["head_dim"] if family == "llama" and part in ("attn_q", "attn_k") else None
        weights.append(Weight(names[name], tensor, dtype, head))
    return weights


def _names(family: str, layers: int) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face name, of every tensor that the family has."""
    names = {f"{old}.weight": f"{new}.weight" for old, new in TOP.items()}
    parts = LAYER | EXTRA.get(family, {})
    for layer in range(layers):
        for old, new in parts.items():
            names[f"blk.{layer}.{old}.weight"] = f"model.layers.{layer}.{new}.weight"
        for old in BIASED.get(family, ()):
            names[f"blk.{layer}.{old}.bias"] = f"model.layers.{layer}.{LAYER[old]}.bias"
    return names


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """[out, in] of each matrix; the first entry is also the length of its bias or of a norm."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "token_embd": (config["vocab_size"], hidden),
        "output": (config["vocab_size"], hidden),
        "output_norm": (hidden,),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
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
        header[weight.name] = {
            "dtype": weight.dtype,
            "shape": weight.source.shape,
            "data_offsets": [at, at + weight.size],
        }
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


def _blocks(source: "GgufFile", weight: Weight) -> Iterator["NDArray[np.generic]"]:
    """The tensor's rows in their type on disk, some at a time."""
    import numpy as np
    from gguf.quants import dequantize

    tensor = weight.source
    step = max(1, BLOCK_ELEMENTS // tensor.shape[-1])
    if weight.head:
        step = max(weight.head, step // weight.head * weight.head)
    for first in range(0, tensor.rows, step):
        block: NDArray[Any] = source.read_rows(tensor, first, min(step, tensor.rows - first))
        if tensor.type.name not in ("F32", "F16", "BF16"):
            try:
                exact = dequantize(block, tensor.type)
            except NotImplementedError:
                raise HubError(f"{source.path.name}: no way back from {tensor.type.name} of {tensor.name}") from None
            with np.errstate(over="ignore"):
                block = exact.astype(np.float16)
            if not np.isfinite(block).all():
                raise HubError(f"{source.path.name}: tensor {tensor.name} holds values that float16 cannot")
        if weight.head:
            block = unpermute(block, weight.head)
        yield np.ascontiguousarray(block)


def unpermute(rows: "NDArray[Any]", head: int) -> "NDArray[Any]":
    """Rows [heads * head, n] from llama.cpp's order, pairs (i, i + head/2) side by side, back to half behind half."""
    return rows.reshape(-1, head // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
