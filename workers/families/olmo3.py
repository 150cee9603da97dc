"""OLMo 3: OLMo 2 with sliding windows in three of four layers, whose rotation is not scaled."""

from dataclasses import replace

from aiollm.workers.families import olmo2
from aiollm.workers.families.values import FULL, SLIDING, windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.rotary import Rope, read_rope
from aiollm.workers.model.spec import DecoderSpec

NAMES = olmo2.NAMES


def spec(config: Config) -> DecoderSpec:
    """OLMo 2's, with windows."""
    found = windowed(config, olmo2.base(config, FULL), lambda layer: (layer + 1) % 4 != 0)
    return replace(found, rope=_local(config, found))


def _local(config: Config, found: DecoderSpec) -> Rope | None:
    """The rotation of layers with a window; in older configurations the scaling is that of the others."""
    if config.section("rope_parameters"):
        return read_rope(config, found.head_dim, found.max_position, layer_type=SLIDING)
    return found.rope and replace(found.rope, scaling=None)
