"""Rotary position embedding: the frequencies of each published scaling, and the table of cosines and sines."""

import math
from dataclasses import dataclass

import torch

from aiollm.workers.model.config import Config, ConfigError


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths stretched by `factor`, short ones kept, a blend between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Yarn:
    """Blend by number of rotations over the original context (Peng et al., 2023)."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies cosines and sines
    truncate: bool


@dataclass(frozen=True)
class Rope:
    """`dim` leading dimensions of each head are rotated, with wavelengths from 2 pi up to 2 pi theta."""

    dim: int
    theta: float
    scaling: Linear | Llama3 | Yarn | None = None


def read_rope(config: Config, dim: int, max_position: int, theta: float = 10000.0) -> Rope:
    """The Rope of a config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    theta = config.take(float, "rope_theta", theta)
    parameters = config.section("rope_parameters")
    scaling = config.section("rope_scaling")
    if parameters is not None:
        theta = parameters.take(float, "rope_theta", theta)
        scaling = parameters
    if scaling is None:
        return Rope(dim, theta)
    scaling.require("partial_rotary_factor", 1.0)
    rope = Rope(dim, theta, _read_scaling(scaling, max_position))
    if left := scaling.unread():
        raise ConfigError(f"rope parameters that are not understood: {', '.join(left)}")
    return rope


def _read_scaling(config: Config, max_position: int) -> Linear | Llama3 | Yarn | None:
    name = config.take(str, "rope_type", config.take(str, "type", "default"))
    if name == "default":
        return None
    factor = config.take(float, "factor")
    if name == "dynamic":
        # Its base grows with sequences longer than the trained context only, and none is longer here.
        config.require("original_max_position_embeddings", max_position)
        return None
    if name == "linear":
        return Linear(factor)
    original = config.take(int, "original_max_position_embeddings", max_position)
    if name == "llama3":
        return Llama3(factor, config.take(float, "low_freq_factor"), config.take(float, "high_freq_factor"), original)
    if name == "yarn":
        return Yarn(
            factor,
            original,
            beta_fast=config.take(float, "beta_fast", 32.0),
            beta_slow=config.take(float, "beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(config, factor),
            truncate=config.take(bool, "truncate", True),
        )
    raise ConfigError(f"rope type {name!r} is not supported; these are: default, linear, dynamic, llama3, yarn")


def _yarn_attention_factor(config: Config, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over = config.take(float, "mscale", 0.0)
    under = config.take(float, "mscale_all_dim", 0.0)
    default = scale(over) / scale(under) if over and under else scale(1.0)
    return config.take(float, "attention_factor", default)


def inverse_frequencies(rope: Rope) -> torch.Tensor:
    """Radians per position of each pair of dimensions: [dim / 2] float32."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / factor
        case Llama3() as scaling:
            # How far each wavelength lies from the low-frequency end (0: stretched) to the high one (1: kept).
            rotations = scaling.original_max_position * plain / (2 * math.pi)
            width = scaling.high_freq_factor - scaling.low_freq_factor
            kept = ((rotations - scaling.low_freq_factor) / width).clamp(0, 1)
            return plain / scaling.factor * (1 - kept) + plain * kept
        case Yarn() as scaling:

            def dimension(rotations: float) -> float:
                """The pair that turns this often over the original context."""
                ratio = scaling.original_max_position / (rotations * 2 * math.pi)
                return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

            low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, rope.dim - 1)
            width = high - low or 0.001  # no division by zero where the ramp is a step
            kept = 1 - ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
            return plain / scaling.factor * (1 - kept) + plain * kept


def cos_sin_table(rope: Rope, positions: int, device: torch.device) -> torch.Tensor:
    """[positions, dim] float32: cosines in the first half of the columns, sines in the second."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(rope)
    scale = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=1).to(device)
