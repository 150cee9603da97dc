"""Reading a checkpoint's config.json: what a family takes, what it requires, and what nobody looked at."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
MISSING: Any = object()

# Keys that say nothing about what a text decoder computes.
HARMLESS = frozenset({
    "_from_model_config", "_name_or_path", "apply_query_key_layer_scaling", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_dropout_prob", "attn_implementation", "attn_pdrop", "auto_map", "bf16",
    "bias_dropout_fusion", "boi_token_index", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "dtype", "emb_dropout_prob", "embd_pdrop", "embedding_dropout", "eoi_token_index",
    "eos_token_id", "fp16", "fp32", "gradient_checkpointing", "hidden_dropout", "id2label", "image_token_id",
    "image_token_index", "inference_runner", "initializer_range", "is_encoder_decoder", "is_llama_config", "label2id",
    "masked_softmax_fusion", "max_batch_size", "max_sequence_length", "max_window_layers", "mm_tokens_per_image",
    "model_type", "multimodal_projector_bias", "offset_alibi", "onnx_safe", "output_attentions", "output_hidden_states",
    "pad_key_length", "pad_token_id", "pre_allocate_kv_cache", "problem_type", "projector_hidden_act", "resid_pdrop",
    "residual_dropout", "return_dict", "scale_attention_softmax_in_fp32", "skip_bias_add", "skip_bias_add_qkv",
    "slow_but_exact", "softmax_in_fp32", "spatial_merge_size", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "tokenizer_class", "tokenizer_type", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
    "use_cache_kernel", "use_cache_quantization", "use_flash_attn", "validate_runner_input", "vision_config",
    "vision_feature_layer", "z_loss_weight",
})  # fmt: skip


class ConfigError(ValueError):
    """The configuration lacks a value or holds one that is not supported."""


class Config:
    """A config.json whose every read is noted. A key whose value is null counts as absent, as in transformers."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()
        self._sections: dict[str, Config] = {}

    def take(self, kind: type[T], key: str, default: T = MISSING) -> T:
        """The value of `key`, which must be of `kind` (an int will do as a float). Absent: the default, or an error."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is MISSING:
                raise ConfigError(f"{self._where}: {key} is missing")
            return default
        if kind is float and type(value) is int:
            return kind(value)  # type: ignore[call-arg]
        if type(value) is not kind:
            raise ConfigError(f"{self._where}: {key} is {value!r}, expected {kind.__name__}")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuse any value of `key` but the allowed ones. An absent key passes: its default must be allowed."""
        self._read.add(key)
        value = self._values.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "absent"
            raise ConfigError(f"{self._where}: {key} is {value!r}, supported: {expected}")

    def has(self, key: str) -> bool:
        """Whether `key` has a value."""
        return self._values.get(key) is not None

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> "Config | None":
        """The object under `key` as a Config of its own, the same one each time, or None where there is none.

        `defaults` stand in for what it lacks.
        """
        values = {name: value for name, value in self.take(dict, key, {}).items() if value is not None}
        if values and key not in self._sections:
            self._sections[key] = Config({**(defaults or {}), **values}, f"{self._where}: {key}")
        return self._sections.get(key)

    def unread(self) -> list[str]:
        """Keys that have a value, that nobody read and that are not known to be harmless; `a.b` is b in object a."""
        present = {key for key, value in self._values.items() if value is not None}
        inner = [f"{name}.{key}" for name, section in self._sections.items() for key in section.unread()]
        return sorted([*(present - self._read - HARMLESS), *inner])
