"""Mistral is Llama with a sliding window, which must be off or never reached."""

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's, without its biases."""
    found = llama.base(config)
    window = config.take(int, "sliding_window", found.max_position)
    if window < found.max_position:
        raise ConfigError(f"config.json: sliding_window is {window}, supported: null or >= {found.max_position}")
    return found
