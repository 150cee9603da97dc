"""InternLM 2 and 2.5: Llama, with queries, keys and values in one tensor."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {
    "embedding": "model.tok_embeddings.weight",
    "norm": "model.norm.weight",
    "head": "output.weight",
    "layers.{}.attention_norm": "model.layers.{}.attention_norm.weight",
    "layers.{}.mlp_norm": "model.layers.{}.ffn_norm.weight",
    "layers.{}.qkv_by_group": "model.layers.{}.attention.wqkv.weight",
    "layers.{}.qkv_by_group_bias": "model.layers.{}.attention.wqkv.bias",
    "layers.{}.o": "model.layers.{}.attention.wo.weight",
    "layers.{}.o_bias": "model.layers.{}.attention.wo.bias",
    "layers.{}.gate": "model.layers.{}.feed_forward.w1.weight",
    "layers.{}.up": "model.layers.{}.feed_forward.w3.weight",
    "layers.{}.down": "model.layers.{}.feed_forward.w2.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Llama's."""
    config.require("pretraining_tp", 1)
    biased = config.take(bool, "bias", False)
    return replace(llama.base(config), qkv_bias=biased, o_bias=biased)
