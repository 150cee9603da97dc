"""Llama 1 to 3, and what is published under its name (SmolLM2, TinyLlama, Yi, DeepSeek-Coder and others)."""

from dataclasses import replace

from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import read_rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.{}.up_bias": "model.layers.{}.mlp.up_proj.bias",
    "layers.{}.down_bias": "model.layers.{}.mlp.down_proj.bias",
}


def spec(config: Config) -> DecoderSpec:
    """The decoder of a config.json. Raises ConfigError, here as in every family, for what cannot be served."""
    config.require("pretraining_tp", 1)
    biased = config.take(bool, "attention_bias", False)
    mlp_bias = config.take(bool, "mlp_bias", False)
    return replace(base(config), qkv_bias=biased, o_bias=biased, mlp_bias=mlp_bias)


def base(config: Config) -> DecoderSpec:
    """What the families of Llama's shape have in common."""
    config.require("hidden_act", "silu")
    config.require("partial_rotary_factor", 1.0)
    hidden = config.take(int, "hidden_size")
    heads = config.take(int, "num_attention_heads")
    head_dim = config.take(int, "head_dim", hidden // max(heads, 1))
    max_position = config.take(int, "max_position_embeddings")
    return DecoderSpec(
        layers=config.take(int, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.take(int, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=config.take(int, "intermediate_size"),
        vocab=config.take(int, "vocab_size"),
        max_position=max_position,
        norm_eps=config.take(float, "rms_norm_eps"),
        rope=read_rope(config, head_dim, max_position),
        tied_head=config.take(bool, "tie_word_embeddings", False),
    )
