"""Gemma 1: scaled embeddings, norms that multiply by 1 + weight."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's shape with tied embeddings; whatever kind of gelu the configuration says, it is the tanh one."""
    for key in ("hidden_act", "hidden_activation"):
        config.require(key, "gelu", "gelu_pytorch_tanh")
    return replace(base(config), activation="gelu_tanh")


def base(config: Config, layer_type: str = "") -> DecoderSpec:
    """What all Gemmas have in common. `layer_type` is that of the layers that `rope` is for."""
    config.require("use_bidirectional_attention", False)
    found = llama.base(config, tied=True, layer_type=layer_type)
    biased = config.take(bool, "attention_bias", False)
    return replace(found, qkv_bias=biased, o_bias=biased, unit_offset=True, embedding_scale=found.hidden**0.5)
