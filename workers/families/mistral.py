"""Mistral, Ministral, Mistral-Small: sliding windows in all layers, some or none; heads of any width."""

from aiollm.workers.families import llama
from aiollm.workers.families.values import windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's, without its biases and with a window."""
    return windowed(config, llama.base(config))
