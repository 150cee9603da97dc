"""A tiny GGUF file of any supported family, written the way llama.cpp's converter writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "12 3", "123 4"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "Ġworld", "<extra>"]

# A type for every kind of tensor, so that each way through the converter is taken.
KINDS = {
    "token_embd": Kind.Q8_0,
    "output": Kind.BF16,
    "attn_q": Kind.Q4_1,
    "attn_k": Kind.Q8_0,
    "attn_v": Kind.F16,
    "attn_output": Kind.BF16,
    "ffn_gate": Kind.Q4_1,
    "ffn_up": Kind.F32,
    "ffn_down": Kind.Q8_0,
}

Tensors = dict[str, np.ndarray]
WriteGguf = Callable[..., Tensors]


def _tensors(family: str, tied: bool) -> Tensors:
    """Random float32 weights under their GGUF names, rows in Hugging Face order."""
    random = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 0.1, (rows, columns)).astype(np.float32)

    def vector(size: int) -> np.ndarray:
        return random.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"token_embd.weight": matrix(len(TOKENS), HIDDEN), "output_norm.weight": vector(HIDDEN)}
    if not tied:
        tensors["output.weight"] = matrix(len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": vector(HIDDEN),
            "attn_q.weight": matrix(HEADS * HEAD, HIDDEN),
            "attn_k.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            "attn_v.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            "attn_output.weight": matrix(HIDDEN, HEADS * HEAD),
            "ffn_norm.weight": vector(HIDDEN),
            "ffn_gate.weight": matrix(INNER, HIDDEN),
            "ffn_up.weight": matrix(INNER, HIDDEN),
            "ffn_down.weight": matrix(HIDDEN, INNER),
        }
        if family == "qwen3":
            block |= {"attn_q_norm.weight": vector(HEAD), "attn_k_norm.weight": vector(HEAD)}
        if family == "qwen2":
            block |= {f"attn_{name}.bias": vector(size * HEAD) for name, size in zip("qkv", (HEADS, 2, 2), strict=True)}
        tensors |= {f"blk.{layer}.{name}": value for name, value in block.items()}
    return tensors


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the query and key rows of a llama model."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _write(
    path: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    fields: dict[str, Any] | None = None,
    extra: Tensors | None = None,
) -> Tensors:
    """Writes the file; returns what its tensors hold (after quantisation), by GGUF name, in Hugging Face order.

    `fields` replace or add string, number and list entries of the metadata, `extra` adds float32 tensors.
    """
    entries: dict[str, Any] = {
        f"{family}.block_count": LAYERS,
        f"{family}.context_length": 256,
        f"{family}.embedding_length": HIDDEN,
        f"{family}.feed_forward_length": INNER,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": KV_HEADS,
        f"{family}.attention.key_length": HEAD,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 4), 4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    } | (fields or {})
    writer = gguf.GGUFWriter(path, family)
    for key, value in entries.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    held = {}
    for name, value in _tensors(family, tied).items():
        part = name.split(".")[-2]
        kind = KINDS.get(part, Kind.F32) if value.ndim == 2 else Kind.F32
        stored = gguf.quants.quantize(value, kind)
        held[name] = gguf.quants.dequantize(stored, kind)
        if family == "llama" and part in ("attn_q", "attn_k"):
            stored = gguf.quants.quantize(_permuted(value, HEADS if part == "attn_q" else KV_HEADS), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture
def write_gguf() -> WriteGguf:
    return _write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(folder))
    return folder
