"""Phi-3, Phi-3.5 and Phi-4 (text): long contexts by LongRoPE, partial rotation, a sliding window."""

from aiollm.workers.families import llama
from aiollm.workers.families.values import windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.FRAME | {
    "layers.{}.qkv": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers.{}.gate_up": "model.layers.{}.mlp.gate_up_proj.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Llama's shape with a window, without biases."""
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.require(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        config.require(key, 1)
    config.take(int, "original_max_position_embeddings", 0)  # says nothing without LongRoPE
    return windowed(config, llama.base(config, partial=1.0))
