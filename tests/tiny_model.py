"""Tiny random checkpoints, made with transformers: small enough for a test, odd enough to find mistakes."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from translations import TRANSLATIONS

FAMILIES = {
    "bloom": ("BloomConfig", "BloomForCausalLM"),
    "cohere": ("CohereConfig", "CohereForCausalLM"),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "glm": ("GlmConfig", "GlmForCausalLM"),
    "glm4": ("Glm4Config", "Glm4ForCausalLM"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM"),
    "granite": ("GraniteConfig", "GraniteForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "ministral": ("MinistralConfig", "MinistralForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM"),
}
# What transformers would take from its defaults, made for models of another size; an epsilon that is no trifle beside
# scaled embeddings.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 11, "sliding_window_pattern": 2},
    "gemma": {"head_dim": 12, "rms_norm_eps": 0.1},
    "gemma2": {"head_dim": 12, "rms_norm_eps": 0.1, "sliding_window": 11, "query_pre_attn_scalar": 10,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0},
    "gemma3": {"head_dim": 12, "rms_norm_eps": 0.1, "sliding_window": 11, "query_pre_attn_scalar": 10},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "granite": {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3,
                "attention_multiplier": 8**-0.5, "rms_norm_eps": 0.1},
    "llama": {"head_dim": 8},
    "ministral": {"sliding_window": 11, "head_dim": 20,
                  "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "mistral": {"sliding_window": None},
    "olmo3": {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3": {"head_dim": 20},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"partial_rotary_factor": 0.5},
}  # fmt: skip
# Keys that a family does not know: it would keep them without looking at them.
UNKNOWN = {
    "bloom": {"intermediate_size", "num_key_value_heads", "max_position_embeddings"},
    "gpt_bigcode": {"intermediate_size", "num_key_value_heads"},
}


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write config.json and model.safetensors of a random model into `folder`, and return the folder.

    A family that transformers lacks is translated from one that it has; see `equivalent`.

    Three layers, six query heads on two KV heads, 97 tokens. `overrides` are fields of the family's transformers
    config, e.g. vocab_size=300, tie_word_embeddings=True. A `max_shard_size` such as "20KB" splits the checkpoint.
    """
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    family, translate = TRANSLATIONS.get(family, (family, None))
    source = folder / "equivalent" if translate else folder
    values |= DEFAULTS.get(family, {})
    values = {key: value for key, value in values.items() if key not in UNKNOWN.get(family, ())}
    config_name, model_name = FAMILIES[family]
    config = getattr(transformers, config_name)(**values | overrides)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:  # born as ones or zeros, which would hide a mix-up
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.to(dtype).save_pretrained(source, max_shard_size=max_shard_size)
    if translate:
        values = json.loads((source / "config.json").read_text())
        values, tensors = translate(values, load_file(source / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(values))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def equivalent(folder: Path) -> Path:
    """Where the model lies that transformers can read: the folder, or for a family that it lacks a folder inside."""
    inside = folder / "equivalent"
    return inside if inside.exists() else folder


def write_reward_model(folder: Path, family: str, **overrides: Any) -> Path:
    """A tiny reward model ("internlm2" or "qwen2"), as write_tiny_model makes a tiny model; `folder` must exist.

    Its output layer stays in the file, as in some published ones.
    """
    write_tiny_model(folder, family, **overrides)
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    hidden, random = config["hidden_size"], torch.Generator().manual_seed(7)
    own = {
        "internlm2": {"v_head.weight": (1, hidden)},
        "qwen2": {
            "score.0.weight": (hidden, hidden), "score.0.bias": (hidden,), "score.2.weight": (1, hidden),
            "score.2.bias": (1,),
        },
    }[family]  # fmt: skip
    kind = {"internlm2": "InternLM2ForRewardModel", "qwen2": "Qwen2ForRewardModel"}[family]
    values = {"architectures": [kind], "num_labels": 1} | ({"reward_token_id": 96} if family == "internlm2" else {})
    (folder / "config.json").write_text(json.dumps(config | values))
    save_file(load_file(file) | {name: torch.randn(shape, generator=random) for name, shape in own.items()}, file)
    return folder


def in_fp32(folder: Path) -> Any:
    """The checkpoint as transformers loads it. Its fused attention leaves soft caps out, in 5.17 silently."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def expected_score(folder: Path, ids: list[int]) -> float:
    """The score of a tiny reward model, by transformers and the reward heads as published."""
    tensors = load_file(folder / "model.safetensors")
    model = in_fp32(equivalent(folder))
    with torch.no_grad():
        x = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    if "v_head.weight" in tensors:
        return float(x @ tensors["v_head.weight"][0])
    x = torch.relu(tensors["score.0.weight"] @ x + tensors["score.0.bias"])
    return float(x @ tensors["score.2.weight"][0] + tensors["score.2.bias"])
