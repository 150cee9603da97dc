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
    **{
        f"layers.{{}}.{ours}": f"model.layers.{{}}.{theirs}"
        for part, members in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
        for member in members
        for ours, theirs in (
            (member, f"{part}.{member}_proj.weight"),
            (f"{member}_bias", f"{part}.{member}_proj.bias"),
        )
    },
}


def spec(config: Config) -> DecoderSpec:
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
