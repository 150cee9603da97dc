"""OLMo 2: norms behind each layer and none before, queries and keys normed over their whole width."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {name: there for name, there in llama.NAMES.items() if not name.endswith((".attention_norm", ".mlp_norm"))} | {
    "layers.{}.attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Llama's shape, normed elsewhere."""
    return base(config)


def base(config: Config, layer_type: str = "") -> DecoderSpec:
    """What OLMo 2 and 3 have in common. `layer_type` is that of the layers that `rope` is for."""
    biased = config.take(bool, "attention_bias", False)
    return replace(
        llama.base(config, layer_type=layer_type),
        qkv_bias=biased,
        o_bias=biased,
        qk_norm="width",
        pre_norm=False,
        post_norm=True,
    )
