"""Which file describes which architecture, by the name in config.json."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import DecoderSpec

# Each module has `spec(config) -> DecoderSpec` and `NAMES`, logical names (workers.model.parameters) to checkpoint's.
FAMILIES = {
    "LlamaForCausalLM": "aiollm.workers.families.llama",
    "MistralForCausalLM": "aiollm.workers.families.mistral",
    "Qwen2ForCausalLM": "aiollm.workers.families.qwen2",
    "Qwen3ForCausalLM": "aiollm.workers.families.qwen3",
}


class Description(NamedTuple):
    """A checkpoint as its config.json describes it."""

    spec: DecoderSpec
    names: Mapping[str, str]  # logical names to those in the checkpoint; `{}` stands for the layer
    unread: list[str]  # keys of config.json that nobody understood; worth a warning


def describe(values: Mapping[str, Any]) -> Description:
    """Read a parsed config.json. Raises ConfigError where it cannot be served as it says."""
    config = Config(values)
    architectures = config.take(list, "architectures")
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        named = ", ".join(map(str, architectures)) or "nothing"
        raise ConfigError(f"config.json: architectures names {named}, supported: {', '.join(FAMILIES)}")
    config.require("quantization_config")
    family = import_module(FAMILIES[known[0]])
    return Description(family.spec(config), family.NAMES, config.unread())
