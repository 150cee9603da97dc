"""Every family comes back out of a GGUF file as the model that it was, to the last number.

The files are written as llama.cpp writes them: names by the `gguf` package's own map, and what llama.cpp does to
tensors on the way done here once more.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_model import write_tiny_model

from aiollm.hub.gguf import convert
from aiollm.hub.gguf_families import FAMILIES
from aiollm.workers.families.registry import describe
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import TensorParallel
from aiollm.workers.weights import load

Tensors = dict[str, torch.Tensor]
HEADS, KV_HEADS, LAYERS, VOCAB = 6, 2, 3, 97
EPS, LN_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.125, 1.25],
    "long_factor": [1.25, 2.5, 7.0], "original_max_position_embeddings": 24, "attention_factor": 1.375,
}  # fmt: skip


def permuted(tensors: Tensors) -> Tensors:
    """llama.cpp's order of the rows of queries and keys."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name and "norm" not in name:
                rows = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
                found[name] = rows.swapaxes(1, 2).reshape(tensor.shape)
    return found


def parted(tensors: Tensors, name: str, parts: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Tensors:
    """The tensors called `name` in parts of their own."""
    found = {}
    for whole, tensor in tensors.items():
        if name in whole:
            found |= {whole.replace(name, part): take(tensor) for part, take in parts.items()}
        else:
            found[whole] = tensor
    return found


def internlm2(tensors: Tensors) -> Tensors:
    """Queries, keys and values of each KV head, taken apart."""
    width, own = 8, HEADS // KV_HEADS

    def rows(first: int, last: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda t: t.reshape(KV_HEADS, own + 2, width, *t.shape[1:])[:, first:last].reshape(-1, *t.shape[1:])

    parts = {"q_proj": rows(0, own), "k_proj": rows(own, own + 1), "v_proj": rows(own + 1, own + 2)}
    found = permuted(parted(tensors, "wqkv", parts))
    return {re.sub(r"([qkv])_proj", r"w\1", name): tensor for name, tensor in found.items()}


def baichuan(tensors: Tensors) -> Tensors:
    names = ["q_proj", "k_proj", "v_proj"]
    found = parted(tensors, "W_pack", {name: lambda t, i=i: t.chunk(3)[i] for i, name in enumerate(names)})  # type: ignore[misc]
    for name, tensor in found.items():
        if "q_proj" in name or "k_proj" in name:
            found[name] = tensor.reshape(HEADS, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return found


def bloom(tensors: Tensors) -> Tensors:
    """All queries, then keys, then values, which were those of each head in turn."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if "query_key_value" in name:
            turns = tensor.reshape(HEADS, 3, -1, *tensor.shape[1:])
            found[name] = turns.swapaxes(0, 1).reshape(tensor.shape)
    return found


def gemma(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


def stablelm(tensors: Tensors) -> Tensors:
    """The norms of all heads in one tensor."""
    found = {name: tensor for name, tensor in tensors.items() if ".norms." not in name}
    for layer in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            at = f"model.layers.{layer}.self_attn.{part}_layernorm"
            if f"{at}.norms.0.weight" in tensors:
                found[f"{at}.weight"] = torch.stack([tensors[f"{at}.norms.{i}.weight"] for i in range(heads)])
    return found


def same(tensors: Tensors) -> Tensors:
    return tensors


# GGUF architecture, family, its options, what llama.cpp does to tensors, and what it writes of the configuration.
CASES: dict[str, tuple[str, str, dict[str, Any], Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "llama": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, permuted, {EPS: 1e-6}),
    "mistral": ("llama", "mistral", {"head_dim": 12}, permuted, {EPS: 1e-6}),
    "internlm2": ("internlm2", "internlm2", {}, internlm2, {EPS: 1e-6}),
    "qwen": (
        "qwen", "qwen", {"num_key_value_heads": 6}, same,
        {EPS: 1e-6, "feed_forward_length": 160, "attention.head_count_kv": 6},
    ),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}, same, {EPS: 1e-6}),
    "qwen3": ("qwen3", "qwen3", {}, same, {EPS: 1e-6}),
    "gemma": ("gemma", "gemma", {"tie_word_embeddings": True}, gemma, {EPS: 0.1}),
    "gemma2": (
        "gemma2", "gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 12}, gemma,
        {EPS: 0.1, "attention.sliding_window": 11, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0},
    ),
    "gemma3": (
        "gemma3", "gemma3", {"tie_word_embeddings": True, "query_pre_attn_scalar": 12}, gemma,
        {EPS: 0.1, "attention.sliding_window": 11},
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": 15}, same, {EPS: 1e-5, "attention.sliding_window": 15}),
    "phi3_longrope": (
        "phi3", "phi3",
        {
            "rope_parameters": LONGROPE, "original_max_position_embeddings": 24, "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        },
        same,
        {
            EPS: 1e-5, "attention.sliding_window": 0, "rope.dimension_count": 6, "rope.scaling.attn_factor": 1.375,
            "rope.scaling.original_context_length": 24,
        },
    ),
    "starcoder": (
        "starcoder", "gpt_bigcode", {"tie_word_embeddings": True}, same,
        {LN_EPS: 1e-5, "attention.head_count_kv": 1, "feed_forward_length": 192},
    ),
    "starcoder2": ("starcoder2", "starcoder2", {"tie_word_embeddings": True}, same, {LN_EPS: 1e-5}),
    "chatglm": ("chatglm", "chatglm", {}, same, {EPS: 1.5625e-07, "rope.dimension_count": 6}),
    "glm4": ("glm4", "glm4", {"attention_bias": True}, same, {EPS: 1.5625e-07, "rope.dimension_count": 6}),
    "minicpm": (
        "minicpm", "minicpm", {"tie_word_embeddings": True}, permuted,
        {EPS: 0.1, "embedding_scale": 6.0, "residual_scale": 0.3, "logit_scale": 4.0},
    ),
    "granite": (
        "granite", "granite", {"attention_bias": True, "attention_multiplier": 0.375}, permuted,
        {EPS: 0.1, "embedding_scale": 6.0, "residual_scale": 0.3, "logit_scale": 4.0, "attention.scale": 0.375},
    ),
    "command-r": (
        "command-r", "cohere", {"tie_word_embeddings": True, "use_qk_norm": True}, same,
        {LN_EPS: 1e-5, "logit_scale": 0.0625, "rope.freq_base": 500000.0},
    ),
    "cohere2": (
        "cohere2", "cohere2", {"tie_word_embeddings": True, "sliding_window_pattern": 4}, same,
        {LN_EPS: 1e-5, "logit_scale": 0.0625, "attention.sliding_window": 11},
    ),
    "olmo2": ("olmo2", "olmo2", {}, same, {EPS: 1e-5}),
    "olmo3": (
        "olmo2", "olmo3", {"layer_types": None}, same,
        {EPS: 1e-5, "attention.sliding_window": 11, "rope.freq_base": 500000.0},
    ),
    "stablelm": (
        "stablelm", "stablelm", {"use_qkv_bias": True}, stablelm, {LN_EPS: 1e-5, "rope.dimension_count": 4},
    ),
    "stablelm_parallel": (
        "stablelm", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, stablelm,
        {LN_EPS: 1e-5, "rope.dimension_count": 4},
    ),
    "bloom": (
        "bloom", "bloom", {"tie_word_embeddings": True, "seq_length": 512}, bloom,
        {LN_EPS: 1e-5, "attention.head_count_kv": 6, "feed_forward_length": 192},
    ),
    "baichuan": (
        "baichuan", "baichuan", {"num_key_value_heads": 6}, baichuan, {EPS: 1e-6, "attention.head_count_kv": 6},
    ),
    "smollm3": (
        "smollm3", "smollm3", {"tie_word_embeddings": True, "no_rope_layer_interval": 4}, permuted,
        {EPS: 1e-6, "rope.freq_base": 2e6},
    ),
}  # fmt: skip


def write(path: Path, case: str, folder: Path) -> None:
    """The GGUF file of a tiny model."""
    architecture, family, _, change, fields = CASES[case]
    tensors = change(load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), LAYERS)
    heads = config.get("num_key_value_heads", KV_HEADS)
    base = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": 48, "feed_forward_length": 80,
        "attention.head_count": HEADS, "attention.head_count_kv": heads,
        "attention.key_length": config.get("head_dim") or config.get("kv_channels") or 8, "rope.freq_base": 10000.0,
    }  # fmt: skip
    if family == "gemma3":
        base["rope.freq_base"] = 1e6
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (base | fields).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", [str(i) for i in range(VOCAB)])
    for name, tensor in tensors.items():
        if "inv_freq" not in name and not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            forms = (name, name.removeprefix("transformer."))
            there = next(
                filter(None, (names.get_name(form, try_suffixes=(".weight", ".bias")) for form in forms)), None
            )
            assert there is not None, name
            writer.add_tensor(there, np.ascontiguousarray(tensor.numpy()))
    if "rope.scaling.attn_factor" in fields:
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(LONGROPE[f"{kind}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values(spec: DecoderSpec) -> tuple[Any, ...]:
    """What a spec says, however it says what each layer sees."""
    reaches = [spec.reach(layer) for layer in range(spec.layers)]
    return replace(spec, rope=None, global_rope=None, window=0, global_layers=frozenset()), reaches


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_as_it_was(tmp_path: Path, case: str) -> None:
    original = tmp_path / "original"
    original.mkdir()
    _, family, options, _, _ = CASES[case]
    write_tiny_model(original, family, **{key: value for key, value in options.items() if value is not None})
    if family == "olmo3":
        config = json.loads((original / "config.json").read_text())
        config["layer_types"] = None
        (original / "config.json").write_text(json.dumps(config))
    write(tmp_path / "tiny.gguf", case, original)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, lambda message, part: None)
    was, now = (describe(json.loads((at / "config.json").read_text())) for at in (original, folder))
    assert now.unread == []
    assert values(now.spec) == values(was.spec)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "tp": TensorParallel()}
    before, after = (load(at, it.spec, it.names, **options) for at, it in ((original, was), (folder, now)))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=2e-7)  # an offset of norms rounds


def test_every_architecture_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == FAMILIES.keys()


def undone(kind: Kind) -> bool:
    """Whether the package has a way back from it."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in Kind if undone(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_that_the_package_can_undo_is_undone(tmp_path: Path, kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 64, (97, 256 // block * size), np.uint8)  # small: scales are no NaN
    exact = gguf.quants.dequantize(raw, kind).reshape(97, 256)
    assert np.isfinite(exact).all() and np.abs(exact).max() < 65504
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from aiollm.hub.gguf import _run, _weight, _write_weights
    from aiollm.hub.gguf_file import GgufFile

    with GgufFile(tmp_path / "tiny.gguf") as source:
        weight = _weight("lm_head.weight", [_run(source.tensors["output.weight"])])
        _write_weights(tmp_path / "model.safetensors", source, [weight], lambda message, part: None)
    found = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found.float(), torch.from_numpy(exact).to(found.dtype).float())


def test_baichuan_of_40_layers_is_the_one_with_alibi() -> None:
    small, large = (FAMILIES["baichuan"].config(SimpleNamespace(layers=n, context=4096)) for n in (32, 40))  # type: ignore[arg-type]
    assert small == {"model_max_length": 4096}
    assert large == {"model_max_length": 4096, "max_position_embeddings": None}
