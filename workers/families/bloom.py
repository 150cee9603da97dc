"""BLOOM, BLOOMZ: ALiBi, layer norms, a feed-forward layer without gate."""

from aiollm.workers.families.values import either
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "transformer.word_embeddings.weight",
    "embedding_norm": "transformer.word_embeddings_layernorm.weight",
    "embedding_norm_bias": "transformer.word_embeddings_layernorm.bias",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "transformer.h.{}.input_layernorm.weight",
    "layers.{}.attention_norm_bias": "transformer.h.{}.input_layernorm.bias",
    "layers.{}.mlp_norm": "transformer.h.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_norm_bias": "transformer.h.{}.post_attention_layernorm.bias",
    "layers.{}.qkv_by_group": "transformer.h.{}.self_attention.query_key_value.weight",
    "layers.{}.qkv_by_group_bias": "transformer.h.{}.self_attention.query_key_value.bias",
    "layers.{}.o": "transformer.h.{}.self_attention.dense.weight",
    "layers.{}.o_bias": "transformer.h.{}.self_attention.dense.bias",
    "layers.{}.up": "transformer.h.{}.mlp.dense_h_to_4h.weight",
    "layers.{}.up_bias": "transformer.h.{}.mlp.dense_h_to_4h.bias",
    "layers.{}.down": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "layers.{}.down_bias": "transformer.h.{}.mlp.dense_4h_to_h.bias",
}


def spec(config: Config) -> DecoderSpec:
    """Sizes have two spellings. `seq_length` is what it was trained with: ALiBi has no border of its own."""
    config.require("apply_residual_connection_post_layernorm", False)
    config.take(int, "pretraining_tp", 1)  # how the training added up, which other families do otherwise
    hidden = either(config, "hidden_size", "n_embed")
    heads = either(config, "n_head", "num_attention_heads")
    return DecoderSpec(
        layers=either(config, "n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // max(heads, 1),
        intermediate=4 * hidden,
        vocab=config.take(int, "vocab_size"),
        max_position=config.take(int, "seq_length", 2048),
        norm_eps=config.take(float, "layer_norm_epsilon", 1e-5),
        rope=None,
        tied_head=config.take(bool, "tie_word_embeddings", True),
        centered=True,
        norm_bias=True,
        alibi=True,
        qkv_bias=True,
        o_bias=True,
        activation="gelu_tanh",
        gated=False,
        mlp_bias=True,
        embedding_norm=True,
    )
