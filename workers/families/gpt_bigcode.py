"""StarCoder 1, SantaCoder: learned positions, one KV head, layer norms, a feed-forward layer without gate."""

from aiollm.workers.families.values import activation
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1.weight",
    "layers.{}.attention_norm_bias": "transformer.h.{}.ln_1.bias",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2.weight",
    "layers.{}.mlp_norm_bias": "transformer.h.{}.ln_2.bias",
    "layers.{}.qkv": "transformer.h.{}.attn.c_attn.weight",
    "layers.{}.qkv_bias": "transformer.h.{}.attn.c_attn.bias",
    "layers.{}.o": "transformer.h.{}.attn.c_proj.weight",
    "layers.{}.o_bias": "transformer.h.{}.attn.c_proj.bias",
    "layers.{}.up": "transformer.h.{}.mlp.c_fc.weight",
    "layers.{}.up_bias": "transformer.h.{}.mlp.c_fc.bias",
    "layers.{}.down": "transformer.h.{}.mlp.c_proj.weight",
    "layers.{}.down_bias": "transformer.h.{}.mlp.c_proj.bias",
}


def spec(config: Config) -> DecoderSpec:
    """GPT-2's shape and keys, with one KV head."""
    config.require("multi_query", True)
    config.require("num_key_value_heads", 1)
    config.require("scale_attn_weights", True)
    config.require("add_cross_attention", False)
    hidden = config.take(int, "n_embd")
    heads = config.take(int, "n_head")
    return DecoderSpec(
        layers=config.take(int, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=1,
        head_dim=hidden // max(heads, 1),
        intermediate=config.take(int, "n_inner", 4 * hidden),
        vocab=config.take(int, "vocab_size"),
        max_position=config.take(int, "n_positions"),
        norm_eps=config.take(float, "layer_norm_epsilon", 1e-5),
        rope=None,
        tied_head=config.take(bool, "tie_word_embeddings", True),
        centered=True,
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        activation=activation(config, "activation_function"),
        gated=False,
        mlp_bias=True,
        learned_positions=True,
    )
