"""Reading a checkpoint's config.json: what a family takes, what it requires, and what nobody looked at."""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
MISSING: Any = object()

# Keys that say nothing about what the decoder computes.
HARMLESS = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "is_llama_config", "label2id",
    "max_window_layers", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "return_dict", "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip


class ConfigError(ValueError):
    """The configuration lacks a value or holds one that is not supported."""


class Config:
    """A config.json whose every read is noted. A key whose value is null counts as absent, as in transformers."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

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

    def section(self, key: str) -> "Config | None":
        """The object under `key` as a Config of its own, or None where there is none."""
        values = self.take(dict, key, {})
        return Config(values, f"{self._where}: {key}") if values else None

    def unread(self) -> list[str]:
        """Keys that have a value, that nobody read and that are not known to be harmless."""
        present = {key for key, value in self._values.items() if value is not None}
        return sorted(present - self._read - HARMLESS)
