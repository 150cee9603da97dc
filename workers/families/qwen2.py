"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's, with biases on queries, keys and values."""
    return replace(base(config), qkv_bias=True)


def base(config: Config) -> DecoderSpec:
    """Llama's shape, and full attention in every layer: a sliding window must be off, whatever its size says."""
    config.require("use_sliding_window", False)
    config.take(int, "sliding_window", 0)
    kinds = config.take(list, "layer_types", [])
    if other := sorted(set(kinds) - {"full_attention"}):
        raise ConfigError(f"config.json: layer_types has {', '.join(other)}, supported: full_attention")
    return llama.base(config)
