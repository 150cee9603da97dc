"""Mistral-Small 3.1 and 3.2, without their eyes: the text decoder, as Mistral."""

from aiollm.workers.families import mistral
from aiollm.workers.families.values import text_part
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = {name: f"language_model.{there}" for name, there in mistral.NAMES.items()}


def spec(config: Config) -> DecoderSpec:
    """That of the object `text_config`."""
    config.require("tie_word_embeddings", False)
    text = text_part(config, {})
    text.require("model_type", "mistral")
    return mistral.spec(text)
