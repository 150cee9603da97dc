"""Command-R, Command-R+, Aya: parallel layers, layer norms without biases, scaled logits."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES | {
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """What both generations have in common, and norms of queries and keys where they are on."""
    normed = config.take(bool, "use_qk_norm", False)
    return replace(base(config), qk_norm="heads" if normed else None)


def base(config: Config) -> DecoderSpec:
    """Llama's shape with tied embeddings and parallel layers, rotated in neighbouring pairs."""
    config.require("pretraining_tp", 1)
    biased = config.take(bool, "attention_bias", False)
    # Command-R says the length that its positions were first trained with, and the one that it can do.
    length = "model_max_length" if config.has("model_max_length") else "max_position_embeddings"
    config.take(int, "max_position_embeddings", 0)
    return replace(
        llama.base(config, eps="layer_norm_eps", length=length, tied=True, interleaved=True),
        qkv_bias=biased,
        o_bias=biased,
        centered=True,
        parallel=True,
        logit_scale=config.take(float, "logit_scale", 0.0625),
    )
