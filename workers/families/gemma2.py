"""Gemma 2: sliding windows in every second layer, soft caps of scores and logits, norms before and behind layers."""

from dataclasses import replace

from aiollm.workers.families import gemma, llama
from aiollm.workers.families.values import activation, windowed
from aiollm.workers.model.config import Config
from aiollm.workers.model.spec import DecoderSpec

NAMES = llama.NAMES | {
    "layers.{}.attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def spec(config: Config) -> DecoderSpec:
    """Gemma 1's, with a window, caps and more norms."""
    return capped(config, windowed(config, gemma.base(config), lambda layer: layer % 2 == 0))


def capped(config: Config, found: DecoderSpec) -> DecoderSpec:
    """What Gemma 2 and 3 add to Gemma 1."""
    config.take(str, "hidden_act", "")  # what counts is the other key, here and of the window
    config.take(int, "sliding_window_size", 0)
    return replace(
        found,
        activation=activation(config, "hidden_activation"),
        post_norm=True,
        attention_scale=config.take(float, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=config.take(float, "attn_logit_softcapping", 0.0),
        logit_softcap=config.take(float, "final_logit_softcapping", 0.0),
    )
