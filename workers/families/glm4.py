"""GLM-4-0414 (dense): GLM with norms before and behind each layer."""

from dataclasses import replace

from aiollm.workers.families import glm
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = glm.NAMES | {
    "layers.{}.attention_post_norm": "model.layers.{}.post_self_attn_layernorm.weight",
    "layers.{}.mlp_post_norm": "model.layers.{}.post_mlp_layernorm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """GLM's, with more norms."""
    return replace(glm.spec(config), post_norm=True)
