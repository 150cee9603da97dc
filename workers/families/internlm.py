"""InternLM 1: Llama with biases in attention."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Llama's; later configurations have an object `rotary`, whose "dynamic" acts on longer contexts than these."""
    biased = config.take(bool, "bias", True)
    found = replace(llama.base(config), qkv_bias=biased, o_bias=biased)
    if rotary := config.section("rotary"):
        rotary.require("type", "origin", "dynamic")
        found = replace(found, rope=Rope(found.head_dim, rotary.take(float, "base", 10000.0)))
    return found
