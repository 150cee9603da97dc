"""StableLM 2 and StableLM-3B: layer norms, a quarter of each head is rotated, parallel layers in the 12B."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES | {
    "norm_bias": "model.norm.bias",
    "layers.{}.attention_norm_bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.mlp_norm_bias": "model.layers.{}.post_attention_layernorm.bias",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_layernorm.norms.{}.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_layernorm.norms.{}.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Llama's shape; each head has a norm of its own where they are on."""
    normed = config.take(bool, "qk_layernorm", False)
    return replace(
        llama.base(config, eps="layer_norm_eps", partial=0.25),
        qkv_bias=config.take(bool, "use_qkv_bias", False),
        qk_norm="heads" if normed else None,
        centered=True,
        norm_bias=True,
        parallel=config.take(bool, "use_parallel_residual", False),
    )
