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
class LongRope:
    """A factor for each wavelength (Ding et al., 2024): `long` where contexts may exceed the original one."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position: int
    attention_factor: float  # multiplies cosines and sines


Scaling = Linear | Llama3 | Yarn | LongRope | None


@dataclass(frozen=True)
class Rope:
    """`dim` leading dimensions of each head are rotated, with wavelengths from 2 pi up to 2 pi theta."""

    dim: int
    theta: float
    scaling: Scaling = None
    interleaved: bool = False  # dimension 2i is paired with 2i + 1; otherwise i is with i + dim / 2


def read_rope(
    config: Config,
    head_dim: int,
    max_position: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
    layer_type: str = "",
) -> Rope:
    """The Rope of a config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    `theta` and `partial`, the share of each head that is rotated, are a family's defaults; without `partial` the family
    rotates all of it. `layer_type` names the object in `rope_parameters` where each type of layer has its own.
    """
    theta = config.take(float, "rope_theta", theta)
    share = _share(config, partial)
    parameters = config.section("rope_parameters")
    scaling = config.section("rope_scaling")
    if parameters is not None:
        scaling = (parameters.section(layer_type) if layer_type else None) or parameters
        theta = scaling.take(float, "rope_theta", theta)
    if scaling is None:
        return Rope(int(head_dim * share), theta, None, interleaved)
    share = _share(scaling, None if partial is None else share)
    dim = int(head_dim * share)
    rope = Rope(dim, theta, _read_scaling(scaling, config, dim, max_position), interleaved)
    if left := scaling.unread():
        raise ConfigError(f"rope parameters that are not understood: {', '.join(left)}")
    return rope


def _share(config: Config, partial: float | None) -> float:
    if partial is None:
        config.require("partial_rotary_factor", 1.0)
        return 1.0
    return config.take(float, "partial_rotary_factor", partial)


def _read_scaling(scaling: Config, config: Config, dim: int, max_position: int) -> Scaling:
    name = scaling.take(str, "rope_type", scaling.take(str, "type", "default"))
    if name == "default":
        return None
    if name in ("longrope", "su"):
        return _read_longrope(scaling, config, dim, max_position)
    factor = scaling.take(float, "factor")
    if name == "dynamic":
        # Its base grows with sequences longer than the trained context only, and none is longer here.
        scaling.require("original_max_position_embeddings", max_position)
        return None
    if name == "linear":
        return Linear(factor)
    original = scaling.take(int, "original_max_position_embeddings", max_position)
    if name == "llama3":
        low, high = scaling.take(float, "low_freq_factor"), scaling.take(float, "high_freq_factor")
        return Llama3(factor, low, high, original)
    if name == "yarn":
        return Yarn(
            factor,
            original,
            beta_fast=scaling.take(float, "beta_fast", 32.0),
            beta_slow=scaling.take(float, "beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(scaling, factor),
            truncate=scaling.take(bool, "truncate", True),
        )
    raise ConfigError(
        f"rope type {name!r} is not supported; these are: default, linear, dynamic, llama3, yarn, longrope"
    )


def _read_longrope(scaling: Config, config: Config, dim: int, max_position: int) -> LongRope:
    original = config.take(int, "original_max_position_embeddings", max_position)
    original = scaling.take(int, "original_max_position_embeddings", original)
    short, long = (tuple(map(float, scaling.take(list, name))) for name in ("short_factor", "long_factor"))
    if {len(short), len(long)} != {dim // 2}:
        raise ConfigError(f"longrope has {len(short)} and {len(long)} factors for {dim // 2} pairs of dimensions")
    factor = scaling.take(float, "factor", max_position / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(short, long, original, scaling.take(float, "attention_factor", grown))


def _yarn_attention_factor(config: Config, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over = config.take(float, "mscale", 0.0)
    under = config.take(float, "mscale_all_dim", 0.0)
    default = scale(over) / scale(under) if over and under else scale(1.0)
    return config.take(float, "attention_factor", default)


def inverse_frequencies(rope: Rope, positions: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, in contexts of up to `positions`: [dim / 2] float32."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / factor
        case LongRope() as scaling:
            return plain / torch.tensor(scaling.long if positions > scaling.original_max_position else scaling.short)
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


def cos_sin_table(rope: Rope | None, positions: int, device: torch.device) -> torch.Tensor:
    """[positions, dim] float32: cosines in the first half of the columns, sines in the second.

    Without a Rope it is one pair of dimensions that is turned by 0.
    """
    if rope is None:
        return torch.tensor([1.0, 0.0]).repeat(positions, 1).to(device)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(rope, positions)
    scale = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn | LongRope) else 1.0
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=1).to(device)
