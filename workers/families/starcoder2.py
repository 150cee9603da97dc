"""StarCoder 2: layer norms, a feed-forward layer without gate, biases, a sliding window."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.families.values import windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = (
    llama.FRAME
    | llama.QKV
    | {
        "norm_bias": "model.norm.bias",
        "layers.{}.attention_norm_bias": "model.layers.{}.input_layernorm.bias",
        "layers.{}.mlp_norm_bias": "model.layers.{}.post_attention_layernorm.bias",
        "layers.{}.up": "model.layers.{}.mlp.c_fc.weight",
        "layers.{}.up_bias": "model.layers.{}.mlp.c_fc.bias",
        "layers.{}.down": "model.layers.{}.mlp.c_proj.weight",
        "layers.{}.down_bias": "model.layers.{}.mlp.c_proj.bias",
    }
)


def spec(config: Config) -> DecoderSpec:
    """Llama's shape, with a feed-forward layer that is not gated."""
    config.require("mlp_type", "default")
    config.require("norm_type", "layer_norm")
    biased = config.take(bool, "use_bias", True)
    found = windowed(config, llama.base(config, eps="norm_epsilon", tied=True))
    return replace(found, gated=False, centered=True, norm_bias=True, qkv_bias=biased, o_bias=biased, mlp_bias=biased)
