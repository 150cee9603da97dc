"""MiniCPM 1, 2 and 4 (dense): scaled embeddings, layers and logits."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.families.values import scaled_residual
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's with three scales (Hu et al., 2024, section 3.1)."""
    config.require("sparse_config")
    config.require("num_experts", 0)
    biased = config.take(bool, "attention_bias", False)
    found = replace(
        llama.base(config, tied=True),
        qkv_bias=biased,
        o_bias=biased,
        embedding_scale=config.take(float, "scale_emb", 1.0),
    )
    width = config.take(int, "dim_model_base", found.hidden)
    depth = config.take(float, "scale_depth", found.layers**0.5)
    return scaled_residual(replace(found, logit_scale=width / found.hidden), depth / found.layers**0.5)
