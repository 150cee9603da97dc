"""The answers as types: what openapi.json says of them, and tests hold them to. Answers may have more fields."""

from typing import Any

import msgspec

from aiollm.api.generation import Usage


class Error(msgspec.Struct, frozen=True):
    """`code` is a slug that programs may compare, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(msgspec.Struct, frozen=True):
    """Any answer but 2xx; in a stream, an event."""

    error: Error


class ChatAnswer(msgspec.Struct, frozen=True):
    role: str
    content: str | None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatAnswer
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: int | str | None


class TextCompletion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(msgspec.Struct, frozen=True):
    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True):
    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Generated(msgspec.Struct, frozen=True):
    """Several choices make lists of the next two."""

    generated_text: list[str]
    count_output_tokens: int | list[int]
    finish_reason: str | list[str]
    prompt_tokens: int
    input_usage: dict[str, int]


class Counted(msgspec.Struct, frozen=True):
    ntokens: int


class Score(msgspec.Struct, frozen=True):
    score: float
    prompt_tokens: int
    finish_reason: str


class Tokenized(msgspec.Struct, frozen=True):
    """Several prompts make lists of all but `max_model_len`."""

    count: int | list[int]
    max_model_len: int
    tokens: list[int | list[int]]
    token_strs: list[str | list[str]] | None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str | list[str]
    text: str | list[str]


class Cancelled(msgspec.Struct, frozen=True):
    id: str
    cancelled: int


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True):
    object: str
    data: list[ModelCard]


class ModelName(msgspec.Struct, frozen=True):
    model_name: str


class Load(msgspec.Struct, frozen=True):
    """Shares of the KV cache."""

    current_load: float
    logical_max_load: float
    dynamic_max_load: float


class Health(msgspec.Struct, frozen=True):
    status: str


class Readiness(msgspec.Struct, frozen=True):
    status: str
    phase: str
    progress: float
    error: str


class Version(msgspec.Struct, frozen=True):
    version: str


class ServerInfo(msgspec.Struct, frozen=True):
    status: str
    version: str
    versions: dict[str, str]
    model: dict[str, Any]
    limits: dict[str, Any]
    settings: dict[str, Any]
    memory: dict[str, int] | None
