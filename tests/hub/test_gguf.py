"""Converted folders hold what the GGUF file held, under the names and in the order of Hugging Face."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from aiollm.hub.errors import HubError
from aiollm.hub.gguf import convert, unpermute
from aiollm.hub.gguf_families import LLAMA, LLAMA_TOP

NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def quiet(message: str, part: float | None) -> None:
    pass


def converted(tmp_path: Path, write_gguf: Any, family: str = "llama", **options: Any) -> tuple[Path, dict[str, Any]]:
    """A converted tiny model: its folder, and the expected float32 tensors under Hugging Face names."""
    held = write_gguf(tmp_path / "tiny.gguf", family, **options)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tmp_path / "tiny.gguf", folder, quiet)
    expected = {}
    for name, value in held.items():
        *block, part, kind = name.split(".")
        new = f"model.layers.{block[1]}.{(LLAMA | NORMS)[part]}" if block else LLAMA_TOP[part]
        expected[f"{new}.{kind}"] = torch.from_numpy(value)
    return folder, expected


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_equals_its_dequantised_original(tmp_path: Path, write_gguf: Any, family: str) -> None:
    folder, expected = converted(tmp_path, write_gguf, family)
    actual = loaded(folder)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value.to(actual[name].dtype)), name


def test_types_on_disk_follow_the_source(tmp_path: Path, write_gguf: Any) -> None:
    actual = loaded(converted(tmp_path, write_gguf)[0])
    layer = "model.layers.0"
    assert actual[f"{layer}.input_layernorm.weight"].dtype == torch.float32
    assert actual[f"{layer}.mlp.up_proj.weight"].dtype == torch.float32
    assert actual[f"{layer}.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert actual[f"{layer}.self_attn.v_proj.weight"].dtype == torch.float16
    assert actual[f"{layer}.self_attn.q_proj.weight"].dtype == torch.float16  # from Q4_1


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_logits_equal_those_of_the_model_it_was_made_from(
    tmp_path: Path, write_gguf: Any, family: str, tied: bool
) -> None:
    folder, expected = converted(tmp_path, write_gguf, family, tied=tied)
    config = transformers.AutoConfig.from_pretrained(folder)
    original = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    stored = {name: expected[name].to(tensor.dtype).float() for name, tensor in loaded(folder).items()}
    missing, unexpected = original.load_state_dict(stored, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    original.tie_weights()
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(reloaded(tokens).logits, original(tokens).logits, rtol=1e-5, atol=1e-5)


def test_unpermute_undoes_the_order_of_llama_cpp() -> None:
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    interleaved = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(interleaved, rows)
    assert np.array_equal(unpermute(interleaved, 8), rows)


def test_config_says_what_the_file_says(tmp_path: Path, write_gguf: Any) -> None:
    folder, expected = converted(tmp_path, write_gguf, "qwen3", tied=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["head_dim"], config["num_key_value_heads"], config["intermediate_size"]) == (16, 2, 96)
    assert config["rms_norm_eps"] == 1e-5  # the file's float32 says 9.99999975e-06
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == len(expected["model.embed_tokens.weight"])
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_every_end_token_that_the_file_names_ends_a_generation(tmp_path: Path, write_gguf: Any) -> None:
    folder, _ = converted(tmp_path, write_gguf, fields={"tokenizer.ggml.eot_token_id": 0})
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_yarn_is_carried_over(tmp_path: Path, write_gguf: Any) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 24.0}
    folder, _ = converted(tmp_path, write_gguf, fields={f"llama.rope.scaling.{key}": v for key, v in scaling.items()})
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0}
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == expected


def test_llama3_factors_become_a_rope_scaling_with_the_same_frequencies(tmp_path: Path, write_gguf: Any) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields: dict[str, Any] = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}
    common = {"head_dim": 16, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    scaled = transformers.AutoConfig.for_model("llama", **common, rope_theta=500000.0, rope_scaling=dict(llama3))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    divisors = (500000.0 ** -(torch.arange(0, 16, 2) / 16) / frequencies).numpy().astype(np.float32)
    assert divisors.min() < 1.0001 < 2.0 < divisors.max()
    folder, _ = converted(tmp_path, write_gguf, fields=fields, extra={"rope_freqs.weight": divisors})
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == llama3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"family": "mamba"},
            "architecture 'mamba' is not supported, only llama, internlm2, qwen, qwen2, qwen3, gemma",
        ),
        ({"extra": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}}, "does not follow"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope'"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "rope.dimension_count is 8, the head size 16"),
        ({"fields": {"llama.feed_forward_length": [96, 96]}}, "feed_forward_length must be one positive number"),
        ({"fields": {"llama.feed_forward_length": 64}}, r"ffn_gate.weight has shape \[96, 64\], not \[64, 64\]"),
        ({"fields": {"llama.block_count": 3}}, r"misses tensor blk\.2\.attn_k\.weight \(of 9 such\)"),
        ({"fields": {"llama.block_count": 4_000_000_000}}, "misses tensor blk.10.attn_k.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, r"misses tensor blk\.1\.attn_q\.bias"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": np.zeros(64, np.float32)}}, r"misses tensor blk\.1\.ffn_gate_exps"),
        ({"extra": {"blk.7.attn_q.weight": np.zeros(64, np.float32)}}, "unexpected tensor blk.7.attn_q.weight"),
        ({"fields": {"split.count": 2}}, "one of 2 parts"),
        ({"fields": {"tokenizer.ggml.tokens": [str(i) for i in range(999)]}}, "names 999 tokens, but only 270"),
    ],
)
def test_what_has_no_exact_counterpart_is_refused(
    tmp_path: Path, write_gguf: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(HubError, match=words):
        converted(tmp_path, write_gguf, **options)


def test_memory_stays_far_below_the_size_of_the_model(tmp_path: Path) -> None:
    """One matrix of 64 MiB in a model of its own: the peak is set by the block, not by the tensor."""
    from aiollm.hub.gguf import Run, Weight, _write_weights
    from aiollm.hub.gguf_file import GgufFile

    matrix = gguf.quants.quantize(np.ones((32768, 1024), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.add_tensor("output.weight", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "big.gguf") as source:
        run = Run(source.tensors["output.weight"], 0, 32768)
        weight = Weight("lm_head.weight", (32768, 1024), "F16", (run,))
        tracemalloc.start()
        _write_weights(tmp_path / "model.safetensors", source, [weight], quiet)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert weight.size == 64 << 20
    assert peak < 40 << 20
    assert bool((loaded(tmp_path)["lm_head.weight"] == 1).all())
