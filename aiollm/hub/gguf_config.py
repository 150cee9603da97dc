"""The hyper-parameters of a GGUF file, and what of them every config.json says."""

import struct
from typing import TYPE_CHECKING, Any

from aiollm.hub.errors import HubError

if TYPE_CHECKING:
    from aiollm.hub.gguf_file import GgufFile

ROPE_FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"

# What every published Llama 3 uses. A file stores the resulting factors only, and these three are not unique in them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Numbers:
    """The hyper-parameters of one file, by their names without the architecture's. Errors: HubError for an odd one."""

    def __init__(self, source: "GgufFile", architecture: str) -> None:
        self.source, self.architecture = source, architecture
        embedding = source.tensors.get("token_embd.weight")
        if embedding is None:
            raise HubError(f"{source.path.name} has no tensor token_embd.weight")
        self.vocab = embedding.shape[0]
        self.hidden: int = self("embedding_length")
        self.heads: int = self("attention.head_count")
        self.kv_heads: int = self("attention.head_count_kv", self.heads)
        self.layers: int = self("block_count")
        self.context: int = self("context_length")
        self.head_dim: int = self("attention.key_length", self.hidden // self.heads)
        self.theta: float = self("rope.freq_base", 10000.0)
        self.rotated: int = self("rope.dimension_count", self.head_dim)
        self.tied = "output.weight" not in source.tensors
        if (values := self("attention.value_length", self.head_dim)) != self.head_dim:
            name = f"{source.path.name}: {architecture}.attention.value_length"
            raise HubError(f"{name} is {values}, the head size {self.head_dim}; not supported")

    def __call__(self, key: str, default: int | float | None = None) -> Any:
        """A positive number; without a default it must be there."""
        value = self.source.fields.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or value <= 0:
            name = f"{self.source.path.name}: {self.architecture}.{key}"
            raise HubError(f"{name} must be one positive number, not {value!r}")
        return _shortest(value) if isinstance(value, float) else value

    @property
    def inner(self) -> int:
        """Columns of the feed-forward layer."""
        found: int = self("feed_forward_length")
        return found // 2 if self.architecture == "qwen" else found

    def optional(self, key: str) -> Any:
        """A number, or None where it is absent or 0."""
        return self(key) if self.source.fields.get(f"{self.architecture}.{key}") else None

    def has(self, part: str) -> bool:
        """Whether the first block has a tensor of that name."""
        return f"blk.0.{part}" in self.source.tensors


def _shortest(value: float) -> float:
    """The shortest decimal number that is rounded to the same float32: 1e-5 is stored as 9.9999997e-06."""
    texts = (f"{value:.{digits}g}" for digits in range(6, 10))
    return next(float(text) for text in texts if struct.pack("<f", float(text)) == struct.pack("<f", value))


def common(n: Numbers, whole_heads: bool) -> dict[str, Any]:
    """What configurations of Llama's shape have. `whole_heads`: another part of them cannot be rotated."""
    if whole_heads and n.rotated != n.head_dim:
        name = f"{n.source.path.name}: {n.architecture}.rope.dimension_count"
        raise HubError(f"{name} is {n.rotated}, the head size {n.head_dim}; not supported")
    config = {
        "model_type": n.architecture,
        "hidden_act": "silu",
        "hidden_size": n.hidden,
        "intermediate_size": n.inner,
        "num_hidden_layers": n.layers,
        "num_attention_heads": n.heads,
        "num_key_value_heads": n.kv_heads,
        "head_dim": n.head_dim,
        "rope_theta": n.theta,
        "max_position_embeddings": n.context,
        "vocab_size": n.vocab,
        "tie_word_embeddings": n.tied,
    }
    if f"{n.architecture}.attention.layer_norm_epsilon" not in n.source.fields:
        config["rms_norm_eps"] = n("attention.layer_norm_rms_epsilon")
    if scaling := rope_scaling(n):
        config["rope_scaling"] = scaling
    return config


def rope_scaling(n: Numbers) -> dict[str, Any] | None:
    """The rope_scaling of a configuration, None where positions are not scaled. See also `longrope`.

    Errors: HubError for a kind that is not known.
    """
    kind = n.source.fields.get(f"{n.architecture}.rope.scaling.type", "none")
    if kind == "none" or (kind == "longrope" and LONG in n.source.tensors):
        return _llama3(n)
    if kind == "linear":
        return {"rope_type": "linear", "factor": n("rope.scaling.factor")}
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": n("rope.scaling.factor"),
            "original_max_position_embeddings": n("rope.scaling.original_context_length"),
        }
        keys = {"attention_factor": "attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        fields = n.source.fields
        present = {new: old for new, old in keys.items() if f"{n.architecture}.rope.scaling.{old}" in fields}
        return scaling | {new: n(f"rope.scaling.{old}") for new, old in present.items()}
    raise HubError(f"{n.source.path.name}: rope scaling {kind!r} is not supported, only none, linear and yarn")


def longrope(n: Numbers) -> dict[str, Any] | None:
    """The rope_scaling of two tensors with a factor for each wavelength, None where they are absent."""
    if LONG not in n.source.tensors:
        return None
    scaling = {"rope_type": "longrope", "short_factor": _factors(n, SHORT), "long_factor": _factors(n, LONG)}
    original = n("rope.scaling.original_context_length", n.context)
    factor = n.optional("rope.scaling.attn_factor")
    return scaling | {"original_max_position_embeddings": original} | ({"attention_factor": factor} if factor else {})


def _factors(n: Numbers, name: str) -> list[float]:
    tensor = n.source.tensors.get(name)
    if tensor is None or tensor.type.name != "F32" or tensor.shape != (n.rotated // 2,):
        raise HubError(f"{n.source.path.name}: {name} must be float32 of length {n.rotated // 2}")
    found: list[float] = n.source.read_rows(tensor, 0, n.rotated // 2).view("<f4")[:, 0].tolist()
    return found


def _llama3(n: Numbers) -> dict[str, Any] | None:
    """The rope_scaling behind `rope_freqs.weight`: the divisors of the rotary frequencies, computed by Llama 3's rule.

    Solved for the factor and checked against every divisor; a file with other divisors is refused.
    """
    if ROPE_FACTORS not in n.source.tensors:
        return None
    import numpy as np

    divisors = np.array(_factors(n, ROPE_FACTORS))
    factor = float(f"{divisors.max():.6g}")
    if factor == 1.0 and np.all(divisors == 1.0):
        return None
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    angles = np.arange(0, n.rotated, 2) / n.rotated
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / (2 * np.pi * n.theta**angles)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise HubError(
            f"{n.source.path.name}: {ROPE_FACTORS} does not follow the rope scaling of Llama 3, the only known"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
