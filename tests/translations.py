"""Models of families that transformers lacks, out of equal ones that it has: the same numbers in another layout.

Each function takes config.json and the tensors of the model that transformers wrote, and gives those of its twin.
"""

from typing import Any

import torch

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """Each name with the first part that `names` knows replaced."""
    found = {}
    for name, tensor in tensors.items():
        old = next((old for old in names if old in name), "")
        found[name.replace(old, names[old], 1) if old else name] = tensor
    return found


def joined(tensors: Tensors, layers: int, parts: list[str], name: str, heads: int = 1) -> Tensors:
    """The rows of each layer's `parts` in one tensor `name`, cut into as many runs as there are `heads`, in turn."""
    found = dict(tensors)
    for i in range(layers):
        for kind in ("weight", "bias"):
            if f"{parts[0].format(i)}.{kind}" in found:
                whole = [found.pop(f"{part.format(i)}.{kind}") for part in parts]
                runs = zip(*(tensor.chunk(heads) for tensor in whole), strict=True)
                found[f"{name.format(i)}.{kind}"] = torch.cat([run for turn in runs for run in turn])
    return found


def llama_qkv() -> list[str]:
    return [f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"]


def internlm(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Llama with biases in attention."""
    rotary = {"type": "dynamic", "base": config["rope_parameters"]["rope_theta"]}
    return llama_keys(config) | {"architectures": ["InternLMForCausalLM"], "bias": True, "rotary": rotary}, tensors


def internlm2(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Llama: queries, keys and values of each KV head in turn."""
    fused, groups = "model.layers.{}.attention.wqkv", config["num_key_value_heads"]
    names = {
        "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    own = {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": config["attention_bias"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    return llama_keys(config) | own, renamed(joined(tensors, LAYERS, llama_qkv(), fused, groups), names)


def minicpm(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Granite: the same scales by other names."""
    own = {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": config["residual_multiplier"] * LAYERS**0.5,
        "dim_model_base": int(config["hidden_size"] / config["logits_scaling"]),
    }
    return llama_keys(config) | own, tensors


def qwen(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Qwen 2 with as many KV heads as query heads."""
    names = {
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "attn.c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    tensors = renamed(joined(tensors, LAYERS, llama_qkv(), "model.layers.{}.attn.c_attn"), names)
    kept = {key: config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")}
    own = {
        "architectures": ["QWenLMHeadModel"], "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"], "no_bias": True, "rotary_pct": 1.0,
        "layer_norm_epsilon": config["rms_norm_eps"], "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "seq_length": config["max_position_embeddings"], "max_position_embeddings": 8192, "use_dynamic_ntk": True,
        "use_logn_attn": True, "scale_attn_weights": True, "tie_word_embeddings": False,
    }  # fmt: skip
    return kept | own, renamed(tensors, {"model.layers": "transformer.h"})


def chatglm(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """GLM under other names."""
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer", "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    tensors = joined(tensors, LAYERS, llama_qkv(), "model.layers.{}.self_attention.query_key_value")
    tensors = renamed(renamed(tensors, names), {"model.layers": "transformer.encoder.layers"})
    kept = {key: config[key] for key in ("hidden_size", "num_attention_heads")}
    own = {
        "architectures": ["ChatGLMModel"], "num_layers": LAYERS, "kv_channels": config["head_dim"],
        "multi_query_attention": True, "multi_query_group_num": config["num_key_value_heads"],
        "ffn_hidden_size": config["intermediate_size"], "padded_vocab_size": config["vocab_size"],
        "seq_length": config["max_position_embeddings"], "layernorm_epsilon": config["rms_norm_eps"],
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000, "rmsnorm": True, "post_layer_norm": True,
        "original_rope": True, "add_bias_linear": False, "apply_residual_connection_post_layernorm": False,
        "add_qkv_bias": config["attention_bias"],
    }  # fmt: skip
    return kept | own, tensors | {"transformer.rotary_pos_emb.inv_freq": torch.ones(3)}


def baichuan(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Llama with as many KV heads as query heads."""
    own = {"architectures": ["BaichuanForCausalLM"], "model_max_length": config["max_position_embeddings"]}
    tensors = joined(tensors, LAYERS, llama_qkv(), "model.layers.{}.self_attn.W_pack")
    return llama_keys(config, "num_key_value_heads") | own, tensors


def baichuan_alibi(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The same with `alibi` for attention."""
    values, tensors = baichuan(config, tensors)
    del values["max_position_embeddings"]
    return values, tensors


def gemma3_vision(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Gemma 3 beside something that sees."""
    text = {key: config[key] for key in config if key != "architectures"}
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"layers": 1}}
    return values, prefixed(tensors) | {"vision_tower.layer.weight": torch.ones(2)}


def mistral3(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Mistral beside something that sees."""
    text = {key: config[key] for key in config if key != "architectures"}
    values = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, "spatial_merge_size": 2}
    return values, prefixed(tensors) | {"multi_modal_projector.norm.weight": torch.ones(2)}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}


def alibi(length: int) -> dict[str, torch.Tensor]:
    """With these arguments a Llama of six heads does not rotate, and its scores fall with distance (paper's slopes)."""
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = torch.where(distance < 0, -torch.inf, -slopes[:, None, None] * distance)
    return {"attention_mask": scores[None], "position_ids": torch.zeros(1, length, dtype=torch.long)}


def llama_keys(config: Config, *but: str) -> Config:
    """What older configurations of Llama's shape say."""
    keys = (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "head_dim",
    )  # fmt: skip
    return {key: config[key] for key in keys if key in config and key not in but}


LAYERS = 3  # of the tiny models
# Family: the one that it is translated from, and how.
TRANSLATIONS = {
    "baichuan": ("llama", baichuan),
    "baichuan_alibi": ("llama", baichuan_alibi),
    "chatglm": ("glm", chatglm),
    "gemma3_vision": ("gemma3", gemma3_vision),
    "internlm": ("llama", internlm),
    "internlm2": ("llama", internlm2),
    "minicpm": ("granite", minicpm),
    "mistral3": ("mistral", mistral3),
    "qwen": ("qwen2", qwen),
}
