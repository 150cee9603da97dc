"""Llama 1 to 3.3, Yi, Vicuna, SmolLM 1 and 2, TinyLlama, DeepSeek-Coder: every scaling of rotation, biases."""

from dataclasses import replace

from aiollm.workers.families.values import activation
from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import read_rope
from aiollm.workers.model.spec import DecoderSpec

FRAME = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.down_bias": "model.layers.{}.mlp.down_proj.bias",
}
QKV = {
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v_bias": "model.layers.{}.self_attn.v_proj.bias",
}
GATE_UP = {
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.{}.up_bias": "model.layers.{}.mlp.up_proj.bias",
}
NAMES = FRAME | QKV | GATE_UP


def spec(config: Config) -> DecoderSpec:
    """The decoder of a config.json. Raises ConfigError, here as in every family, for what cannot be served."""
    config.require("pretraining_tp", 1)
    config.require("rope_interleaved", False)
    biased = config.take(bool, "attention_bias", False)
    mlp_bias = config.take(bool, "mlp_bias", False)
    return replace(base(config), qkv_bias=biased, o_bias=biased, mlp_bias=mlp_bias)


def base(
    config: Config,
    *,
    eps: str = "rms_norm_eps",
    length: str = "max_position_embeddings",
    tied: bool = False,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
    layer_type: str = "",
) -> DecoderSpec:
    """What the families of Llama's shape have in common; see read_rope for the last four arguments.

    `eps` and `length` are the keys of the norms' epsilon and of the longest context.
    """
    hidden = config.take(int, "hidden_size")
    heads = config.take(int, "num_attention_heads")
    head_dim = config.take(int, "head_dim", hidden // max(heads, 1))
    max_position = config.take(int, length)
    return DecoderSpec(
        layers=config.take(int, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.take(int, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=config.take(int, "intermediate_size"),
        vocab=config.take(int, "vocab_size"),
        max_position=max_position,
        norm_eps=config.take(float, eps),
        rope=read_rope(
            config,
            head_dim,
            max_position,
            theta=theta,
            partial=partial,
            interleaved=interleaved,
            layer_type=layer_type,
        ),
        tied_head=config.take(bool, "tie_word_embeddings", tied),
        activation=activation(config, "hidden_act"),
    )
