"""Which file describes which architecture, by the name in config.json."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import DecoderSpec

# Each module has `spec(config) -> DecoderSpec`, `NAMES`, logical names to the checkpoint's (workers.model.sources), and
# a first line for the table of models.
FAMILIES = {
    architecture: f"aiollm.workers.families.{module}"
    for architecture, module in {
        "BaiChuanForCausalLM": "baichuan",
        "BaichuanForCausalLM": "baichuan",
        "BloomForCausalLM": "bloom",
        "ChatGLMForConditionalGeneration": "chatglm",
        "ChatGLMModel": "chatglm",
        "CohereForCausalLM": "cohere",
        "Cohere2ForCausalLM": "cohere2",
        "GemmaForCausalLM": "gemma",
        "Gemma2ForCausalLM": "gemma2",
        "Gemma3ForCausalLM": "gemma3",
        "Gemma3ForConditionalGeneration": "gemma3_vision",
        "GlmForCausalLM": "glm",
        "Glm4ForCausalLM": "glm4",
        "GPTBigCodeForCausalLM": "gpt_bigcode",
        "GraniteForCausalLM": "granite",
        "InternLMForCausalLM": "internlm",
        "InternLM2ForCausalLM": "internlm2",
        "InternLM2ForRewardModel": "internlm2_reward",
        "LlamaForCausalLM": "llama",
        "MiniCPMForCausalLM": "minicpm",
        "MinistralForCausalLM": "mistral",
        "MistralForCausalLM": "mistral",
        "Mistral3ForConditionalGeneration": "mistral3",
        "Olmo2ForCausalLM": "olmo2",
        "Olmo3ForCausalLM": "olmo3",
        "Phi3ForCausalLM": "phi3",
        "QWenLMHeadModel": "qwen",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen2ForRewardModel": "qwen2_reward",
        "Qwen3ForCausalLM": "qwen3",
        "SmolLM3ForCausalLM": "smollm3",
        "StableLmForCausalLM": "stablelm",
        "Starcoder2ForCausalLM": "starcoder2",
    }.items()
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
