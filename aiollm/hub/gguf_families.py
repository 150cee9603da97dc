"""Which Hugging Face architecture a GGUF architecture becomes: its tensors' names, and its config.json.

What llama.cpp does to tensors on the way into a GGUF file is undone: see `Family`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiollm.hub.gguf_config import Numbers, longrope, rope_scaling

LLAMA_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA = ATTENTION | MLP
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA2 = LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT_TOP = {"token_embd": "transformer.wte", "output_norm": "transformer.ln_f", "output": "lm_head"}


@dataclass(frozen=True)
class Family:
    """One GGUF architecture.

    `top` and `layer` map GGUF's names to Hugging Face's, `at` is what stands before those of a layer. Parts that a file
    lacks are passed over here, and noticed by whoever loads the folder.
    """

    architecture: str | Callable[[Numbers], str]
    config: Callable[[Numbers], dict[str, Any]]  # beside `common`
    layer: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: LLAMA_TOP)
    at: str = "model.layers.{}."
    common: bool = True  # the keys of Llama's configuration
    interleaved: bool = False  # rows of queries and keys are pairs (i, i + head / 2), which were half behind half
    by_head: bool = False  # rows of `attn_qkv` are all queries, keys, values, which were those of each head in turn
    joined: str = ""  # the name of one tensor that queries, keys and values become
    norm_offset: float = 0.0  # what was added to the weights of norms
    gate_in_up: bool = False  # `ffn_up` holds the rows of the gate, then its own
    head_norms: str = ""  # the name of a norm for each head, `{}` being its number, where they lie in one tensor


def llama(n: Numbers) -> dict[str, Any]:
    return {"attention_bias": n.has("attn_q.bias"), "mlp_bias": n.has("ffn_up.bias")}


def qwen1(n: Numbers) -> dict[str, Any]:
    return {
        "hidden_size": n.hidden, "num_attention_heads": n.heads, "num_hidden_layers": n.layers, "vocab_size": n.vocab,
        "kv_channels": n.head_dim, "intermediate_size": n("feed_forward_length"), "seq_length": n.context,
        "layer_norm_epsilon": n("attention.layer_norm_rms_epsilon"), "rotary_emb_base": n.theta, "no_bias": True,
        "tie_word_embeddings": n.tied,
    }  # fmt: skip


def gemma(n: Numbers) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def gemma2(n: Numbers, large: int = 46) -> dict[str, Any]:
    """The largest of each generation scales scores by its own width; the files do not say so."""
    return gemma(n) | {
        "sliding_window": n("attention.sliding_window", 4096),
        "query_pre_attn_scalar": n.hidden // n.heads if n.layers == large else n.head_dim,
        "attn_logit_softcapping": n("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": n("final_logit_softcapping", 30.0),
    }


def gemma3(n: Numbers) -> dict[str, Any]:
    return gemma2(n, large=62) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_theta": n("rope.freq_base", 1e6),
        "rope_local_base_freq": n("rope.freq_base_swa", 10000.0),
    }


def phi3(n: Numbers) -> dict[str, Any]:
    original = n("rope.scaling.original_context_length", n.context)
    return {
        "partial_rotary_factor": n.rotated / n.head_dim,
        "original_max_position_embeddings": original,
        "sliding_window": n.optional("attention.sliding_window"),
        "rope_scaling": longrope(n),
    }


def starcoder(n: Numbers) -> dict[str, Any]:
    return {
        "n_embd": n.hidden, "n_head": n.heads, "n_layer": n.layers, "n_positions": n.context, "n_inner": n.inner,
        "vocab_size": n.vocab, "layer_norm_epsilon": n("attention.layer_norm_epsilon"), "multi_query": True,
        "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": n.tied,
    }  # fmt: skip


def starcoder2(n: Numbers) -> dict[str, Any]:
    return {
        "norm_epsilon": n("attention.layer_norm_epsilon"),
        "use_bias": n.has("attn_q.bias"),
        "hidden_act": "gelu_pytorch_tanh",
    }


def chatglm(n: Numbers) -> dict[str, Any]:
    return {
        "hidden_size": n.hidden, "num_attention_heads": n.heads, "num_layers": n.layers, "kv_channels": n.head_dim,
        "multi_query_attention": True, "multi_query_group_num": n.kv_heads, "ffn_hidden_size": n.inner,
        "padded_vocab_size": n.vocab, "seq_length": n.context, "rope_ratio": n.theta / 10000, "rmsnorm": True,
        "layernorm_epsilon": n("attention.layer_norm_rms_epsilon"), "post_layer_norm": True, "original_rope": True,
        "add_qkv_bias": n.has("attn_qkv.bias") or n.has("attn_q.bias"), "tie_word_embeddings": n.tied,
    }  # fmt: skip


def glm4(n: Numbers) -> dict[str, Any]:
    return {"attention_bias": n.has("attn_q.bias"), "partial_rotary_factor": n.rotated / n.head_dim}


def minicpm(n: Numbers) -> dict[str, Any]:
    """Older files lack the scales, which llama.cpp takes for those of MiniCPM 2B."""
    return {
        "scale_emb": n("embedding_scale", 12.0),
        "scale_depth": n("residual_scale", 1.4 / n.layers**0.5) * n.layers**0.5,
        "dim_model_base": round(n.hidden / n("logit_scale", n.hidden / 256)),
        "rope_scaling": longrope(n) or rope_scaling(n),
    }


def granite(n: Numbers) -> dict[str, Any]:
    return llama(n) | {
        "embedding_multiplier": n("embedding_scale"),
        "residual_multiplier": n("residual_scale"),
        "attention_multiplier": n("attention.scale"),
        "logits_scaling": n("logit_scale"),
    }


def cohere(n: Numbers) -> dict[str, Any]:
    return {
        "layer_norm_eps": n("attention.layer_norm_epsilon"),
        "logit_scale": n("logit_scale"),
        "use_qk_norm": n.has("attn_q_norm.weight"),
        "tie_word_embeddings": True,
    }


def cohere2(n: Numbers) -> dict[str, Any]:
    window = {"sliding_window": n("attention.sliding_window"), "sliding_window_pattern": 4}
    return {key: value for key, value in cohere(n).items() if key != "use_qk_norm"} | window


def olmo2(n: Numbers) -> dict[str, Any]:
    window = n.optional("attention.sliding_window")
    return {"attention_bias": False} | ({"sliding_window": window} if window else {})


def stablelm(n: Numbers) -> dict[str, Any]:
    return {
        "layer_norm_eps": n("attention.layer_norm_epsilon"),
        "partial_rotary_factor": n.rotated / n.head_dim,
        "use_qkv_bias": n.has("attn_q.bias"),
        "qk_layernorm": n.has("attn_q_norm.weight"),
        "use_parallel_residual": not n.has("ffn_norm.weight"),
    }


def bloom(n: Numbers) -> dict[str, Any]:
    return {
        "hidden_size": n.hidden, "n_head": n.heads, "n_layer": n.layers, "vocab_size": n.vocab, "seq_length": n.context,
        "layer_norm_epsilon": n("attention.layer_norm_epsilon"), "tie_word_embeddings": n.tied,
    }  # fmt: skip


def baichuan(n: Numbers) -> dict[str, Any]:
    """The 13B, which llama.cpp knows by its 40 layers, has ALiBi: its configuration says `model_max_length` instead."""
    return {"model_max_length": n.context} | ({"max_position_embeddings": None} if n.layers == 40 else {})


def smollm3(n: Numbers) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def plain(n: Numbers) -> dict[str, Any]:
    return {}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", llama, LLAMA, interleaved=True),
    "internlm2": Family("LlamaForCausalLM", llama, LLAMA, interleaved=True),
    "qwen": Family(
        "QWenLMHeadModel",
        qwen1,
        {
            "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_gate": "mlp.w2", "ffn_up": "mlp.w1", "ffn_down": "mlp.c_proj",
        },
        GPT_TOP,
        "transformer.h.{}.",
        common=False,
    ),
    "qwen2": Family("Qwen2ForCausalLM", plain, LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", plain, LLAMA | HEAD_NORMS),
    "gemma": Family("GemmaForCausalLM", gemma, LLAMA, norm_offset=1.0),
    "gemma2": Family("Gemma2ForCausalLM", gemma2, GEMMA2, norm_offset=1.0),
    "gemma3": Family("Gemma3ForCausalLM", gemma3, GEMMA2 | HEAD_NORMS, norm_offset=1.0),
    "phi3": Family(
        "Phi3ForCausalLM", phi3, LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        gate_in_up=True,
    ),
    "starcoder": Family(
        "GPTBigCodeForCausalLM",
        starcoder,
        {
            "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        GPT_TOP | {"position_embd": "transformer.wpe"},
        "transformer.h.{}.",
        common=False,
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", starcoder2, LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    ),
    "chatglm": Family(
        "ChatGLMModel",
        chatglm,
        {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
            "attn_q": "", "attn_k": "", "attn_v": "",  # joined, where they are not yet
            "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        {
            "token_embd": "transformer.embedding.word_embeddings",
            "output_norm": "transformer.encoder.final_layernorm", "output": "transformer.output_layer",
        },
        "transformer.encoder.layers.{}.",
        common=False,
        joined="self_attention.query_key_value",
        gate_in_up=True,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        glm4,
        LLAMA | {
            "ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        gate_in_up=True,
    ),
    "minicpm": Family("MiniCPMForCausalLM", minicpm, LLAMA, interleaved=True),
    "granite": Family("GraniteForCausalLM", granite, LLAMA, interleaved=True),
    "command-r": Family("CohereForCausalLM", cohere, LLAMA | HEAD_NORMS),
    "cohere2": Family("Cohere2ForCausalLM", cohere2, LLAMA),
    "olmo2": Family(
        lambda n: "Olmo3ForCausalLM" if n.optional("attention.sliding_window") else "Olmo2ForCausalLM",
        olmo2,
        LLAMA | HEAD_NORMS | {
            "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        stablelm,
        LLAMA | HEAD_NORMS,
        head_norms="self_attn.{}_layernorm.norms.{}",
    ),
    "bloom": Family(
        "BloomForCausalLM",
        bloom,
        {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        {
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f", "output": "lm_head",
        },
        "transformer.h.{}.",
        common=False,
        by_head=True,
    ),
    "baichuan": Family("BaichuanForCausalLM", baichuan, LLAMA, interleaved=True, joined="self_attn.W_pack"),
    "smollm3": Family("SmolLM3ForCausalLM", smollm3, LLAMA, interleaved=True),
}  # fmt: skip
