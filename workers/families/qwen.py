"""Qwen 1: biases of queries, keys and values; contexts of the trained length."""

from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "transformer.wte.weight",
    "norm": "transformer.ln_f.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1.weight",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2.weight",
    "layers.{}.qkv": "transformer.h.{}.attn.c_attn.weight",
    "layers.{}.qkv_bias": "transformer.h.{}.attn.c_attn.bias",
    "layers.{}.o": "transformer.h.{}.attn.c_proj.weight",
    "layers.{}.gate": "transformer.h.{}.mlp.w2.weight",
    "layers.{}.up": "transformer.h.{}.mlp.w1.weight",
    "layers.{}.down": "transformer.h.{}.mlp.c_proj.weight",
}


def spec(config: Config) -> DecoderSpec:
    """`use_dynamic_ntk` and `use_logn_attn` act on contexts beyond `seq_length` only, and none is longer here."""
    config.require("no_bias", True)
    config.require("rotary_pct", 1.0)
    config.require("scale_attn_weights", True)
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        config.take(bool, key, False)
    config.take(int, "max_position_embeddings", 0)
    heads = config.take(int, "num_attention_heads")
    head_dim = config.take(int, "kv_channels")
    return DecoderSpec(
        layers=config.take(int, "num_hidden_layers"),
        hidden=config.take(int, "hidden_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=config.take(int, "intermediate_size") // 2,  # counts gate and up
        vocab=config.take(int, "vocab_size"),
        max_position=config.take(int, "seq_length"),
        norm_eps=config.take(float, "layer_norm_epsilon"),
        rope=Rope(head_dim, config.take(float, "rotary_emb_base", 10000.0)),
        tied_head=config.take(bool, "tie_word_embeddings", False),
        qkv_bias=True,
    )
