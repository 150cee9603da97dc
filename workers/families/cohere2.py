"""Command-R7B, Command-A: Command-R with sliding windows, every fourth layer without window and rotation."""

from dataclasses import replace

from aiollm.workers.families import cohere, llama
from aiollm.workers.families.values import windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES


def spec(config: Config) -> DecoderSpec:
    """Command-R's, with windows. The keys that are required say what older configurations spell out."""
    config.require("order_of_interleaved_layers", "local_attn_first")
    config.require("position_embedding_type", "rope_gptj")
    config.require("rotary_pct", 1.0)
    for key in ("use_gated_activation", "use_parallel_block", "use_embedding_sharing"):
        config.require(key, True)
    config.require("use_parallel_embedding", False)
    pattern = config.take(int, "sliding_window_pattern", config.take(int, "layer_switch", 4))
    found = windowed(config, cohere.base(config), lambda layer: (layer + 1) % pattern != 0)
    return replace(found, global_rope=None)
