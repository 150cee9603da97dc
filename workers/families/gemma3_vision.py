"""Gemma 3 with vision, without its eyes: the text decoder, as Gemma 3 (text)."""

from typing import Any

from aiollm.workers.families import gemma3
from aiollm.workers.families.values import text_part
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {name: f"language_model.{there}" for name, there in gemma3.NAMES.items()}
# Published configurations leave out what is the same in transformers.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "rope_theta": 1e6,
}  # fmt: skip


def spec(config: Config) -> DecoderSpec:
    """That of the object `text_config`."""
    return gemma3.spec(text_part(config, DEFAULTS))
