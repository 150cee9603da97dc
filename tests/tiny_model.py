"""Tiny random checkpoints, made with transformers: small enough for a test, odd enough to find mistakes."""

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
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
    values |= {"llama": {"head_dim": 8}, "qwen3": {"head_dim": 20}, "mistral": {"sliding_window": None}}.get(family, {})
    config_name, model_name = FAMILIES[family]
    config = getattr(transformers, config_name)(**values | overrides)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms are born as ones and biases as zeros, which would hide a mix-up
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
