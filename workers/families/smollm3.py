"""SmolLM 3: every fourth layer is not rotated."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's, with tied embeddings; `no_rope_layers` holds 0 for each layer without rotation."""
    config.require("use_sliding_window", False)
    config.take(int, "pretraining_tp", 1)  # of its training alone
    config.take(int, "sliding_window", 0)
    biased = config.take(bool, "attention_bias", False)
    mlp_bias = config.take(bool, "mlp_bias", False)
    found = replace(llama.base(config, tied=True, theta=2e6), qkv_bias=biased, o_bias=biased, mlp_bias=mlp_bias)
    config.require("layer_types", ["full_attention"] * found.layers)
    every = config.take(int, "no_rope_layer_interval", 4)
    rotated = config.take(list, "no_rope_layers", [int((i + 1) % every != 0) for i in range(found.layers)])
    if len(rotated) != found.layers:
        raise ConfigError(f"config.json: no_rope_layers has {len(rotated)} entries for {found.layers} layers")
    return replace(found, global_layers=frozenset(i for i, yes in enumerate(rotated) if not yes))
