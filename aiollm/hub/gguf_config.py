"""The hyper-parameters of a GGUF file -> config.json of a Hugging Face folder."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aiollm.hub.errors import HubError
from aiollm.hub.gguf_file import GgufFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

ROPE_FACTORS = "rope_freqs.weight"

# What every published Llama 3 uses. A file stores the resulting factors only, and these three are not unique in them.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def make_config(source: GgufFile) -> dict[str, Any]:
    """The config.json of the file, without dtype and token ids.

    Errors: HubError for an unsupported architecture, a missing or odd hyper-parameter, or a rope that it cannot say.
    """
    architecture = source.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise HubError(f"{source.path.name}: the GGUF architecture {architecture!r} is not supported, only {known}")

    def number(key: str, default: int | float | None = None) -> Any:
        value = source.fields.get(f"{architecture}.{key}", default)
        if not isinstance(value, int | float) or value <= 0:
            raise HubError(f"{source.path.name}: {architecture}.{key} must be one positive number, not {value!r}")
        return float(f"{value:.6g}") if isinstance(value, float) else value  # 1e-5 is stored as float32 9.9999997e-06

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := number(key, head_dim)) != head_dim:
            raise HubError(
                f"{source.path.name}: {architecture}.{key} is {size}, the head size {head_dim}; not supported"
            )
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise HubError(f"{source.path.name} has no tensor token_embd.weight")
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }
    scaling = _rope_scaling(source, architecture, number) or _rope_factors(source, config)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(source: GgufFile, family: str, number: Callable[..., Any]) -> dict[str, Any] | None:
    """The rope_scaling of `<family>.rope.scaling.*`, None where the positions are not scaled."""
    kind = source.fields.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": number("rope.scaling.factor")}
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": number("rope.scaling.factor"),
            "original_max_position_embeddings": number("rope.scaling.original_context_length"),
        }
        keys = {"attention_factor": "attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        present = {new: old for new, old in keys.items() if f"{family}.rope.scaling.{old}" in source.fields}
        return scaling | {new: number(f"rope.scaling.{old}") for new, old in present.items()}
    raise HubError(f"{source.path.name}: rope scaling {kind!r} is not supported, only none, linear and yarn")


def _rope_factors(source: GgufFile, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rope_scaling behind `rope_freqs.weight`: the divisors of the rotary frequencies, computed by Llama 3's rule.

    Solved for the factor and checked against every divisor; a file with other divisors is refused.
    """
    tensor = source.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.shape != (config["head_dim"] // 2,):
        raise HubError(f"{source.path.name}: {ROPE_FACTORS} must be float32 of length {config['head_dim'] // 2}")
    divisors = source.read_rows(tensor, 0, 1).view(np.float32)[0].astype(np.float64)
    factor = float(f"{divisors.max():.6g}")
    if factor == 1.0 and np.all(divisors == 1.0):
        return None
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    angles = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / (2 * np.pi * config["rope_theta"] ** angles)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise HubError(
            f"{source.path.name}: {ROPE_FACTORS} does not follow the rope scaling of Llama 3, the only known"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
