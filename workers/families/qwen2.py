"""Qwen 2 and 2.5: biases of queries, keys and values; a sliding window in the upper layers where it is on."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.families.values import windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's, with biases on queries, keys and values."""
    return replace(base(config), qkv_bias=True)


def base(config: Config) -> DecoderSpec:
    """Llama's shape; `sliding_window` counts where `use_sliding_window` says so, from layer `max_window_layers` on."""
    found = llama.base(config)
    if not config.take(bool, "use_sliding_window", False):
        config.require("layer_types", ["full_attention"] * found.layers)
        config.take(int, "sliding_window", 0)
        return found
    below = config.take(int, "max_window_layers", 28)
    return windowed(config, found, lambda layer: layer >= below)
