"""InternLM 2 reward models: InternLM 2 with a score in place of logits, read at a token of its own."""

from dataclasses import replace

from aiollm.workers.families import internlm2
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = internlm2.NAMES | {"score": "v_head.weight"}


def spec(config: Config) -> DecoderSpec:
    """InternLM 2's; `reward_token_id` is put behind each text, which is [REWARD] where it is not told."""
    config.require("num_labels", 1)
    token = config.take(int, "reward_token_id", 92527)
    return replace(internlm2.spec(config), tied_head=False, reward="linear", reward_token=token)
