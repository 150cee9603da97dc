"""GLM-4-9B and GLM-Edge: half of each head is rotated, in neighbouring pairs."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.FRAME | llama.QKV | {"layers.{}.gate_up": "model.layers.{}.mlp.gate_up_proj.weight"}


def spec(config: Config) -> DecoderSpec:
    """Llama's shape, with biases of queries, keys and values."""
    biased = config.take(bool, "attention_bias", False)
    return replace(llama.base(config, partial=0.5, interleaved=True), qkv_bias=biased)
