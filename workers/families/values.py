"""Values that several families read in the same way."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from aiollm.workers.model.config import Config, ConfigError
from aiollm.workers.model.spec import Activation, DecoderSpec

SLIDING, FULL = "sliding_attention", "full_attention"
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(config: Config, key: str) -> Activation:
    """The activation that `key` names; silu where it is absent."""
    config.require(key, *ACTIVATIONS)
    return ACTIVATIONS[config.take(str, key, "silu")]


def either(config: Config, first: str, second: str) -> int:
    """The integer under one of two spellings of its key."""
    return config.take(int, first, config.take(int, second, 0)) or config.take(int, first)


def text_part(config: Config, defaults: Mapping[str, Any]) -> Config:
    """The configuration of the text decoder of a model with more parts; `defaults` stand in for what it lacks."""
    found = config.section("text_config", defaults)
    if found is None:
        raise ConfigError("config.json: text_config is missing")
    return found


def windowed(config: Config, spec: DecoderSpec, slides: Callable[[int], bool] = lambda layer: True) -> DecoderSpec:
    """`spec` with the sliding window of the configuration, in the layers of `layer_types` or those that `slides` says.

    A window that is never left is none.
    """
    window = config.take(int, "sliding_window", 0)
    default = [SLIDING if window and slides(i) else FULL for i in range(spec.layers)]
    types = config.take(list, "layer_types", default)
    if other := {kind for kind in types if kind not in (SLIDING, FULL)}:
        raise ConfigError(f"config.json: layer_types has {', '.join(map(str, other))}, supported: {SLIDING}, {FULL}")
    if len(types) != spec.layers:
        raise ConfigError(f"config.json: layer_types has {len(types)} entries for {spec.layers} layers")
    if SLIDING in types and not window:
        raise ConfigError(f"config.json: layer_types has {SLIDING}, but sliding_window is not set")
    if window >= spec.max_position:
        window = 0
    full = frozenset(i for i, kind in enumerate(types) if kind == FULL)
    return replace(spec, window=window, global_layers=full, global_rope=spec.rope)


def scaled_residual(spec: DecoderSpec, factor: float) -> DecoderSpec:
    """`spec` with every layer's output multiplied by `factor` before it is added; see DecoderSpec."""
    return replace(spec, embedding_scale=spec.embedding_scale / factor, norm_eps=spec.norm_eps / factor**2)
