"""Granite 3 (dense): scaled embeddings, scores, layers and logits."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.families.values import scaled_residual
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's with four scales."""
    found = replace(
        llama.spec(config),
        embedding_scale=config.take(float, "embedding_multiplier", 1.0),
        attention_scale=config.take(float, "attention_multiplier", 1.0),
        logit_scale=1 / config.take(float, "logits_scaling", 1.0),
    )
    return scaled_residual(found, config.take(float, "residual_multiplier", 1.0))
