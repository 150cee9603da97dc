"""Baichuan 1 and 2: rotation in the 7B, ALiBi in the 13B, a normalised output layer in the second generation."""

from dataclasses import replace

from aiollm.workers.families import llama
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.FRAME | llama.GATE_UP | {"layers.{}.qkv": "model.layers.{}.self_attn.W_pack.weight"}
SECOND = 125696  # tokens of the second generation's vocabulary: its configuration says it in no other way


def spec(config: Config) -> DecoderSpec:
    """Only the 7B say `max_position_embeddings`; what the others were trained with is `model_max_length`."""
    rotated = config.has("max_position_embeddings")
    found = llama.base(config, length="max_position_embeddings" if rotated else "model_max_length")
    config.take(int, "model_max_length", 0)
    found = replace(found, normalized_head=found.vocab == SECOND)
    return found if rotated else replace(found, rope=None, alibi=True)
