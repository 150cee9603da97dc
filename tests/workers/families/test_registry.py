"""What each family reads out of a config.json; that the numbers come out right is for model/test_decoder.py."""

import math
from importlib import import_module
from typing import Any

import pytest

from aiollm.workers.families.registry import FAMILIES, describe
from aiollm.workers.model.config import ConfigError
from aiollm.workers.model.parameters import Piece, parameters
from aiollm.workers.model.rotary import Linear, Rope
from aiollm.workers.model.sources import located

BASE: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
# What families say in keys of their own.
OTHER_KEYS: dict[str, Any] = {
    "norm_epsilon": 1e-6, "layer_norm_eps": 1e-6, "layer_norm_epsilon": 1e-6, "layernorm_epsilon": 1e-6, "n_embd": 48,
    "n_head": 6, "n_layer": 2, "n_positions": 512, "kv_channels": 8, "seq_length": 512, "num_layers": 2,
    "ffn_hidden_size": 80, "padded_vocab_size": 97, "num_key_value_heads": 1,
    "reward_token_id": 96, "text_config": BASE | {"model_type": "mistral"},
}  # fmt: skip


def config(architecture: str, **overrides: Any) -> dict[str, Any]:
    return BASE | {"architectures": [architecture]} | overrides


def test_an_older_llama_config_needs_no_more_than_the_sizes() -> None:
    spec, _, unread = describe(config("LlamaForCausalLM", rope_theta=5e5))
    assert (spec.head_dim, spec.kv_heads, spec.rope, spec.tied_head) == (8, 2, Rope(8, 5e5), False)
    assert not (spec.qk_norm or spec.qkv_bias or spec.o_bias or spec.mlp_bias)
    assert unread == []


def test_each_family_has_its_parts() -> None:
    assert describe(config("LlamaForCausalLM", attention_bias=True)).spec.o_bias
    qwen2 = describe(config("Qwen2ForCausalLM", use_sliding_window=False, sliding_window=4096)).spec
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm
    qwen3 = describe(config("Qwen3ForCausalLM", head_dim=20)).spec
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 20
    assert describe(config("BaichuanForCausalLM", vocab_size=125696)).spec.normalized_head
    assert not describe(config("BaichuanForCausalLM")).spec.normalized_head
    yi = describe(config("LlamaForCausalLM", sliding_window=None, rope_theta=5e6, rope_scaling=None)).spec
    assert (yi.window, yi.embedding_scale, yi.logit_scale) == (0, 1, 1)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (config("MistralForCausalLM", sliding_window=128), [128, 128]),
        (config("MistralForCausalLM", sliding_window=512), [0, 0]),  # never left
        (config("Gemma2ForCausalLM", sliding_window=128, hidden_activation="gelu_pytorch_tanh"), [128, 0]),
        (config("Qwen2ForCausalLM", sliding_window=128, use_sliding_window=False), [0, 0]),
        (config("Qwen2ForCausalLM", sliding_window=128, use_sliding_window=True, max_window_layers=1), [0, 128]),
    ],
)
def test_windows_are_those_of_each_layer(values: dict[str, Any], windows: list[int]) -> None:
    spec = describe(values).spec
    assert [spec.reach(i)[1] for i in range(spec.layers)] == windows


def test_older_gemma_3_configurations_scale_the_rotation_of_their_global_layers_only() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    values = config("Gemma3ForCausalLM", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling)
    spec = describe(values | {"sliding_window": 128, "sliding_window_pattern": 2}).spec
    assert [spec.reach(i) for i in range(2)] == [(Rope(8, 1e4), 128), (Rope(8, 1e6, Linear(8.0)), 0)]


def elements(piece: Piece) -> int:
    """How many numbers a piece takes."""
    return math.prod(len(range(*part.indices(size))) for part, size in zip(piece.take, piece.shape, strict=True))


@pytest.mark.parametrize("module", sorted(set(FAMILIES.values())))
def test_each_table_names_every_tensor_of_its_decoder_once(module: str) -> None:
    architecture = next(name for name, value in FAMILIES.items() if value == module)
    spec, names, _ = describe(config(architecture, **OTHER_KEYS))
    pieces = [piece for parameter in parameters(spec, 0, 1) for piece in parameter.pieces]
    regions = [region for piece in pieces for region in located(piece, spec, names)]
    assert sum(map(elements, regions)) == sum(map(elements, pieces))
    assert sum({region.source: math.prod(region.shape) for region in regions}.values()) == sum(map(elements, pieces))
    assert len(set(names.values())) == len(names)
    assert import_module(module).NAMES is names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config("GptOssForCausalLM"), r"names GptOssForCausalLM, supported: .*, LlamaForCausalLM, M"),
        (BASE, "architectures is missing"),
        (config("Mistral3ForConditionalGeneration"), "text_config is missing"),
        (config("Mistral3ForConditionalGeneration", text_config={"model_type": "x"}), "text_config: model_type is 'x'"),
        (config("LlamaForCausalLM", hidden_act="relu"), "hidden_act is 'relu', supported: 'silu' or 'swish' or"),
        (config("LlamaForCausalLM", pretraining_tp=2), "pretraining_tp is 2"),
        (config("LlamaForCausalLM", quantization_config={"bits": 4}), "quantization_config is"),
        (config("MistralForCausalLM", layer_types=["chunked"] * 2), "layer_types has chunked, supported: sliding"),
        (config("MistralForCausalLM", layer_types=["full_attention"]), "layer_types has 1 entries for 2 layers"),
        (config("MistralForCausalLM", layer_types=["sliding_attention"] * 2), "but sliding_window is not set"),
        (config("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 2), r"layer_types is \['sliding_attention'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(values)


def test_keys_that_nobody_understood_are_reported() -> None:
    assert describe(config("LlamaForCausalLM", embedding_multiplier=12.0)).unread == ["embedding_multiplier"]
