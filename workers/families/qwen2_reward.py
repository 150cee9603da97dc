"""Qwen 2 and 2.5 reward models: Qwen 2 with a score in place of logits, from a layer more."""

from dataclasses import replace

from aiollm.workers.families import qwen2
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = qwen2.NAMES | {
    "score_inner": "score.0.weight",
    "score_inner_bias": "score.0.bias",
    "score": "score.2.weight",
    "score_bias": "score.2.bias",
}


def spec(config: Config) -> DecoderSpec:
    """Qwen 2's. Process reward models, which score every step by several labels, are another architecture."""
    config.require("num_labels", 1)
    return replace(qwen2.spec(config), tied_head=False, reward="mlp")
