"""Qwen 3 (dense): normed queries and keys; a sliding window as Qwen 2 has."""

from dataclasses import replace

from aiollm.workers.families import qwen2
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = qwen2.NAMES | {
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Qwen 2's, with normed heads and optional biases."""
    biased = config.take(bool, "attention_bias", False)
    return replace(qwen2.base(config), qk_norm="head", qkv_bias=biased, o_bias=biased)
