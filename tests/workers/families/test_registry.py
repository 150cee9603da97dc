"""What each family reads out of a config.json; that the numbers come out right is for model/test_decoder.py."""

from importlib import import_module
from typing import Any

import pytest

from aiollm.workers.families.registry import FAMILIES, describe
from aiollm.workers.model.config import ConfigError
from aiollm.workers.model.parameters import parameters
from aiollm.workers.model.rotary import Rope

BASE: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
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


@pytest.mark.parametrize("module", FAMILIES.values())
def test_each_table_names_every_tensor_of_its_decoder_once(module: str) -> None:
    architecture = next(name for name, value in FAMILIES.items() if value == module)
    spec, names, _ = describe(config(architecture))
    needed = {piece.source for parameter in parameters(spec, 0, 1) for piece in parameter.pieces}
    layers = {name.replace("layers.0.", "layers.{}.") for name in needed if not name.startswith("layers.1.")}
    assert layers <= names.keys()
    assert len(set(names.values())) == len(names)
    assert import_module(module).NAMES is names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config("GptOssForCausalLM"), r"names GptOssForCausalLM, supported: LlamaForCausalLM, Mistral"),
        (BASE, "architectures is missing"),
        (config("LlamaForCausalLM", hidden_act="gelu"), "hidden_act is 'gelu', supported: 'silu'"),
        (config("LlamaForCausalLM", pretraining_tp=2), "pretraining_tp is 2"),
        (config("LlamaForCausalLM", quantization_config={"bits": 4}), "quantization_config is"),
        (config("MistralForCausalLM", sliding_window=128), "sliding_window is 128, supported: null or >= 512"),
        (config("Qwen2ForCausalLM", use_sliding_window=True), "use_sliding_window is True"),
        (config("Qwen3ForCausalLM", layer_types=["sliding_attention"]), "layer_types has sliding_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(values)


def test_keys_that_nobody_understood_are_reported() -> None:
    assert describe(config("LlamaForCausalLM", embedding_multiplier=12.0)).unread == ["embedding_multiplier"]
