"""ChatGLM 2 and 3, GLM-4-9B as first published: GLM in an older layout."""

from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "transformer.embedding.word_embeddings.weight",
    "norm": "transformer.encoder.final_layernorm.weight",
    "head": "transformer.output_layer.weight",
    "layers.{}.attention_norm": "transformer.encoder.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm": "transformer.encoder.layers.{}.post_attention_layernorm.weight",
    "layers.{}.qkv": "transformer.encoder.layers.{}.self_attention.query_key_value.weight",
    "layers.{}.qkv_bias": "transformer.encoder.layers.{}.self_attention.query_key_value.bias",
    "layers.{}.o": "transformer.encoder.layers.{}.self_attention.dense.weight",
    "layers.{}.gate_up": "transformer.encoder.layers.{}.mlp.dense_h_to_4h.weight",
    "layers.{}.down": "transformer.encoder.layers.{}.mlp.dense_4h_to_h.weight",
}
REFUSED = (
    "add_bias_linear", "apply_residual_connection_post_layernorm", "fp32_residual_connection", "interleaved_qkv",
    "prefix_projection", "quantization_bit",
)  # fmt: skip


def spec(config: Config) -> DecoderSpec:
    """Half of each head is rotated, in neighbouring pairs; `rope_ratio` multiplies the base of 10000."""
    for key in ("rmsnorm", "post_layer_norm", "original_rope"):
        config.require(key, True)
    for key in REFUSED:
        config.require(key, False)
    config.require("pre_seq_len")
    config.take(int, "num_hidden_layers", 0)
    heads = config.take(int, "num_attention_heads")
    head_dim = config.take(int, "kv_channels")
    few = config.take(bool, "multi_query_attention", False)
    rope = Rope(head_dim // 2, 10000.0 * config.take(float, "rope_ratio", 1.0), interleaved=True)
    return DecoderSpec(
        layers=config.take(int, "num_layers"),
        hidden=config.take(int, "hidden_size"),
        heads=heads,
        kv_heads=config.take(int, "multi_query_group_num", 1) if few else heads,
        head_dim=head_dim,
        intermediate=config.take(int, "ffn_hidden_size"),
        vocab=config.take(int, "padded_vocab_size"),
        max_position=config.take(int, "seq_length"),
        norm_eps=config.take(float, "layernorm_epsilon"),
        rope=rope,
        tied_head=config.take(bool, "tie_word_embeddings", False),
        qkv_bias=config.take(bool, "add_qkv_bias", True),
    )
