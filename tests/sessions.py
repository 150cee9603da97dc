"""Tiny models of every family, and a decoder that computes them step by step: for tests, and for family_table.py."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_model import equivalent, in_fp32
from translations import alibi

from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import on
from aiollm.kernels.ops import Ops, triton_ops
from aiollm.workers.families.registry import describe
from aiollm.workers.groups import lifetimes
from aiollm.workers.model.decoder import Decoder
from aiollm.workers.tp import TensorParallel
from aiollm.workers.weights import load
from aiollm.workers.windows import Windows

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.3, 2.5, 7.0], "original_max_position_embeddings": 24,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama_tied": {"family": "llama", "tie_word_embeddings": True},
    "llama_biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_llama3": {"family": "llama", "rope_parameters": LLAMA3},
    "llama_yarn": {"family": "llama", "rope_parameters": YARN},
    "llama_linear": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    },
    "llama_dynamic": {
        "family": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0},
    },
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "qwen2_window": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "mistral_window": {"family": "mistral", "sliding_window": 13, "head_dim": 20},
    "gemma": {"family": "gemma", "tie_word_embeddings": True},
    "gemma2": {"family": "gemma2", "tie_word_embeddings": True},
    "gemma2_untied": {"family": "gemma2"},
    "gemma3": {"family": "gemma3", "tie_word_embeddings": True, "sliding_window_pattern": 2},
    "gemma3_scaled": {
        "family": "gemma3",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "gemma3_vision": {"family": "gemma3_vision", "tie_word_embeddings": True, "sliding_window_pattern": 2},
    "mistral3": {"family": "mistral3"},
    "phi3": {"family": "phi3", "sliding_window": 15},
    "phi3_longrope": {
        "family": "phi3",
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 24,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "starcoder2": {"family": "starcoder2", "tie_word_embeddings": True},
    "starcoder2_window": {"family": "starcoder2", "sliding_window": 7, "use_bias": False},
    "internlm2": {"family": "internlm2"},
    "internlm2_biased": {"family": "internlm2", "attention_bias": True, "tie_word_embeddings": True},
    "glm": {"family": "glm"},
    "glm4": {"family": "glm4", "attention_bias": False, "tie_word_embeddings": True},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "tie_word_embeddings": True},
    "olmo3_yarn": {
        "family": "olmo3",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": YARN,
        },
    },
    "cohere": {"family": "cohere", "tie_word_embeddings": True},
    "cohere_normed": {"family": "cohere", "use_qk_norm": True, "attention_bias": True},
    "cohere2": {"family": "cohere2", "tie_word_embeddings": True},
    "stablelm": {"family": "stablelm", "use_qkv_bias": True},
    "stablelm_parallel": {
        "family": "stablelm",
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "tie_word_embeddings": True,
    },
    "minicpm": {"family": "minicpm", "tie_word_embeddings": True},
    "granite": {"family": "granite", "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.2},
    "ministral": {"family": "ministral"},
    "smollm3": {"family": "smollm3", "tie_word_embeddings": True},
    "bloom": {"family": "bloom", "tie_word_embeddings": True},
    "bloom_untied": {"family": "bloom"},
    "gpt_bigcode": {"family": "gpt_bigcode", "tie_word_embeddings": True},
    "qwen": {"family": "qwen", "num_key_value_heads": 6},
    "internlm": {"family": "internlm", "attention_bias": True},
    "chatglm": {"family": "chatglm", "rope_parameters": {"rope_theta": 50000.0, "partial_rotary_factor": 0.5}},
    "baichuan": {"family": "baichuan", "num_key_value_heads": 6},
    "baichuan_alibi": {"family": "baichuan_alibi", "num_key_value_heads": 6},
    "qwen3_tied_biased": {"family": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
}
PROMPTS = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (61, 1, 29)]


def logits_of_transformers(checkpoint: Path) -> list[torch.Tensor]:
    """The logits [tokens, vocab] that transformers computes for each prompt, in fp32."""
    model = in_fp32(equivalent(checkpoint))
    values = json.loads((checkpoint / "config.json").read_text())
    with_alibi = values["architectures"] == ["BaichuanForCausalLM"] and "max_position_embeddings" not in values
    with torch.no_grad():
        return [model(prompt[None], **(alibi(len(prompt)) if with_alibi else {})).logits[0] for prompt in PROMPTS]


class Session:
    """A decoder with a KV pool of scattered slots, for the sequences of PROMPTS. What was never stored is NaN."""

    def __init__(self, checkpoint: Path, ops: Ops, dtype: torch.dtype = torch.float32, quantized: bool = False) -> None:
        description = describe(json.loads((checkpoint / "config.json").read_text()))
        spec, tp = description.spec, TensorParallel()
        assert description.unread == []
        quantize = ops.quantize if quantized else None
        self.device = torch.device("cuda" if ops == triton_ops() else "cpu")
        weights = load(checkpoint, spec, description.names, dtype=dtype, device=self.device, tp=tp, quantize=quantize)
        self.ops = ops
        self.groups = lifetimes(spec)
        self.decoder = Decoder(spec, weights, ops, tp, [group for group, _ in self.groups.places])
        count = 300 * self.groups.each
        shape = (count + 1, spec.kv_heads, spec.head_dim)
        pools = torch.full((self.groups.pools, 2, *shape), torch.nan, dtype=dtype, device=self.device)
        self.kv = [(pools[pool, 0], pools[pool, 1]) for _, pool in self.groups.places]
        self.slots = torch.randperm(count, generator=torch.Generator().manual_seed(1)).view(-1, 3, 100)
        self.lengths = [0, 0, 0]
        self.windows = Windows(self.groups.each - 1, self.groups.window, 3, self.groups.window + 61, self.device)
        self.windows.pad_into(count)

    def step(self, new: dict[int, int]) -> dict[int, torch.Tensor]:
        """Compute the next `new[row]` tokens of each row in one Batch -> their logits."""
        rows = list(new)
        spans = {row: range(self.lengths[row], self.lengths[row] + new[row]) for row in rows}
        for row in rows:
            self.lengths[row] += new[row]
        counts = torch.tensor([0, *new.values()])
        token_rows = torch.tensor([row for row in rows for _ in spans[row]], device=self.device)
        slots = torch.cat([self.slots[:, row, spans[row]] for row in rows], dim=1)
        batch = Batch(
            rows=torch.tensor(rows),
            starts=counts.cumsum(0).int(),
            lengths=torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32),
            positions=torch.cat([torch.tensor(spans[row]) for row in rows]),
            slots=slots[0],
            slot_table=self.slots[0].int(),
            max_new=max(new.values()),
            max_length=max(self.lengths[row] for row in rows),
        )
        ids = torch.cat([PROMPTS[row][spans[row].start : spans[row].stop] for row in rows])
        ids, batch = on(self.device, ids, batch)
        self.windows.lay(token_rows, batch.positions, slots[1:].int().flatten().to(self.device))
        batch = batch._replace(windowed=self.windows.batches(batch, token_rows, self.ops))
        hidden = self.decoder.forward(ids, batch, self.kv)
        return dict(zip(rows, self.decoder.logits(hidden).cpu().split(list(new.values())), strict=True))
