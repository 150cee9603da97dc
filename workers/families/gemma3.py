"""Gemma 3 (text): sliding windows with a rotation of their own, normed queries and keys."""

from dataclasses import replace

from aiollm.workers.families import gemma, gemma2
from aiollm.workers.families.values import FULL, SLIDING, windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import Rope, read_rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = gemma2.NAMES | {
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Gemma 2's, with normed heads; every sixth layer sees everything."""
    pattern = config.take(int, "sliding_window_pattern", config.take(int, "_sliding_window_pattern", 6))
    found = windowed(config, gemma.base(config, FULL), lambda layer: (layer + 1) % pattern != 0)
    return replace(gemma2.capped(config, found), qk_norm="head", rope=_local(config, found))


def _local(config: Config, found: DecoderSpec) -> Rope:
    """The rotation of layers with a window; older configurations scale that of the others only."""
    if config.section("rope_parameters"):
        return read_rope(config, found.head_dim, found.max_position, layer_type=SLIDING)
    return Rope(found.head_dim, config.take(float, "rope_local_base_freq", 10000.0))
