"""The two requests of OpenAI's API as types: every field with its range, checked while JSON is decoded.

Unknown fields are ignored, null is the default. Fields that would change the output and that this server does not
have are refused by name, so that nobody takes an answer for something it is not; those of OpenAI's that would not are
told of in the log.
"""

from functools import cache
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Raw

from aiollm.api.decoding import decode
from aiollm.api.errors import invalid
from aiollm.api.messages import MAX_TOOLS, Message, NamedTool, Tool, check_message, check_tools

MAX_STOPS = 32
MAX_LOGPROBS = 20  # alternatives of a token
INT32 = 2**31 - 1

TokenId = Annotated[int, Meta(ge=0, le=INT32)]
Count = Annotated[int, Meta(ge=0, le=INT32)]
Kept = Annotated[int, Meta(ge=-1, le=INT32, extra_json_schema={"not": {"const": 0}})]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=INT32)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=10)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Salt = Annotated[str, Meta(min_length=1, max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}\Z")]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Prompts = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
Scalar = str | int | float | bool | None
JsonSchema = dict[str, Any] | bool | str
"""A schema, or the JSON of one."""
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=4096)]
AllowedTokens = Annotated[list[TokenId], Meta(min_length=1, max_length=16384)]
BadWords = Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=256)]
VariableName = Annotated[str, Meta(max_length=64)]
Variable = Annotated[str, Meta(max_length=4096)] | int | float | bool | None


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the model's generation_config.json says of fields that a request leaves out."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=INT32)] | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`strict` changes nothing: every schema is followed."""

    name: str | None = None
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's has the schema in `json_schema`, llama.cpp's and LightLLM's, which has no type, in `schema`."""

    type: str | None = None
    json_schema: JsonSchemaFormat | None = None
    schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's; one of the first five. Fields typed Any would change the output, and are refused."""

    json: JsonSchema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_additional_properties: Any = None
    disable_any_whitespace: Any = None
    disable_fallback: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_new_tokens: Count | None = None
    min_tokens: Count | None = None
    min_new_tokens: Count | None = None
    temperature: Temperature | None = None
    do_sample: bool | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_penalty: RepetitionPenalty | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Alternatives | None = None
    truncate_prompt_tokens: Kept | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: RequestId | None = None
    rid: RequestId | None = None
    cache_salt: Salt | None = None
    extra_key: Salt | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: JsonSchema | None = None
    regular_constraint: str | None = None
    allowed_token_ids: AllowedTokens | None = None
    bad_words: BadWords | None = None
    adapter_id: Any = None
    custom_logit_processor: Any = None
    data_parallel_rank: Any = None
    dry_multiplier: Any = None
    dynatemp_range: Any = None
    guided_decoding: Any = None
    guided_whitespace_pattern: Any = None
    input_embeds: Any = None
    input_ids: Any = None
    kv_transfer_params: Any = None
    logits_processors: Any = None
    lora_path: Any = None
    mirostat: Any = None
    n_predict: Any = None
    prompt_embeds: Any = None
    return_hidden_states: Any = None
    stop_regex: Any = None
    top_n_sigma: Any = None
    typical_p: Any = None
    use_beam_search: Any = None
    vllm_xargs: Any = None
    watermark: Any = None
    xtc_probability: Any = None
    early_stopping: Raw = Raw()
    length_penalty: Raw = Raw()
    metadata: Raw = Raw()
    prediction: Raw = Raw()
    prompt_cache_key: Raw = Raw()
    safety_identifier: Raw = Raw()
    service_tier: Raw = Raw()
    store: Raw = Raw()
    user: Raw = Raw()
    verbosity: Raw = Raw()

    @property
    def streams(self) -> bool:
        return self.stream is True

    @property
    def length(self) -> tuple[str, int | None]:
        """The most tokens of an answer, with the name under which it was given."""
        pairs = ((name, getattr(self, name)) for name in LENGTHS)
        return next((pair for pair in pairs if pair[1] is not None), (LENGTHS[0], None))

    @property
    def own_id(self) -> str | None:
        """The id that the client has given in the body."""
        return self.request_id or self.rid

    @property
    def salt(self) -> str | None:
        """What keeps its cached prompts apart from those of others."""
        return self.cache_salt or self.extra_key

    @property
    def includes_stop(self) -> bool:
        return self.include_stop_str_in_output is True or self.no_stop_trim is True

    @property
    def drawn(self) -> int:
        """How many choices of a prompt are computed: `n`, or more of which the best are told."""
        return self.n or 1

    @property
    def ignored(self) -> list[str]:
        """Fields that were given and change nothing."""
        return [name for name in IGNORED if bytes(getattr(self, name)) not in (b"", b"null")]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[VariableName, Variable], Meta(max_length=64)] | None = None
    reasoning_effort: str | None = None
    documents: list[dict[str, Scalar]] | None = None
    role_settings: dict[str, Scalar] | None = None
    character_settings: list[dict[str, Scalar]] | None = None
    audio: Any = None
    best_of: Any = None
    chat_template: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    include_reasoning: bool | None = None
    modalities: Any = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: Any = None
    thinking_token_budget: Annotated[int, Meta(ge=-1, le=INT32)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    web_search_options: Any = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions. A prompt is text or token ids; a list of prompts gives choices prompt by prompt."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: Any = None
    top_logprobs: Any = None

    @property
    def drawn(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids. Raises ApiError where the forms are mixed."""
        return prompts_of("prompt", self.prompt)


LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
ALIASES = (
    ("min_tokens", "min_new_tokens"),
    ("repetition_penalty", "repeat_penalty"),
    ("include_stop_str_in_output", "no_stop_trim"),
    ("request_id", "rid"),
    ("cache_salt", "extra_key"),
)
HARMLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "data_parallel_rank": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "embed_dtype": ("float32",),
    "function_call": ("none",),
    "mirostat": (0,),
    "modalities": (["text"],),
    "stream_reasoning": (True,),
    "top_logprobs": (0,),
    "top_n_sigma": (0, -1),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
"""Values that ask for nothing, besides empty ones."""
MEANT: dict[str, Any] = {"guided_whitespace_pattern": "", "stream_reasoning": False, "web_search_options": {}}
"""Empty values that ask for something."""
IGNORED = [field.name for field in msgspec.structs.fields(GenerationRequest) if field.type is Raw]
"""Fields that are known and change nothing here, whatever they hold: two of them are of beam search only."""
INSTEAD = {
    "functions": "OpenAI has replaced this field; give tools",
    "function_call": "OpenAI has replaced this field; give tool_choice",
    "best_of": "only /v1/completions has this field",
    "top_logprobs": "only chats have this field; give their number as logprobs",
    "echo": "only /v1/completions has this field",
    "input_ids": "give token ids as the prompt of /v1/completions",
    "n_predict": "give max_tokens",
    "suffix": "this server does not insert text before a suffix",
}
_CHAT = msgspec.json.Decoder(ChatRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)


def decode_chat(body: bytes, streams: bool = False) -> ChatRequest:
    """A chat request, which with `streams` is one whatever it says itself. Raises ApiError where it is none."""
    request = decode(_CHAT, body)
    if streams:
        request = msgspec.structs.replace(request, stream=True)
    _check_chat(request)
    return request


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError where the body is not a completion request."""
    request = decode(_COMPLETION, body)
    _check(request)
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise invalid("best_of", f"best_of: {request.best_of} choices are fewer than the {request.n} of n")
    if request.streams and request.drawn > (request.n or 1):
        raise invalid("best_of", "best_of: which choices are the best is known at the end, so it cannot be streamed")
    return request


def prompts_of(field: str, prompts: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Each prompt of a field, as text or ids. Raises ApiError where the forms are mixed."""
    if isinstance(prompts, str):
        return [prompts]
    kinds = set(map(type, prompts))
    if kinds == {int}:
        return [cast(list[int], prompts)]  # a copy of a million ids would hold the event loop for 30 ms
    if len(kinds) > 1:
        raise invalid(field, f"{field}: strings, token ids and lists of token ids cannot be mixed")
    return [item for item in prompts if not isinstance(item, int)]


@cache
def unserved(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Fields that are known and not served: those typed Any."""
    return tuple(field.name for field in msgspec.structs.fields(kind) if field.type is Any)


def check_served(request: msgspec.Struct) -> None:
    """Raises ApiError where a field that is not served asks for something."""
    for name in unserved(type(request)):
        if _asks(name, getattr(request, name)):
            instead = INSTEAD.get(name, "this server does not support this field")
            code = "not_allowed" if name == "chat_template" else "unsupported_field"
            raise invalid(name, f"{name}: {instead}", code)


def _asks(name: str, value: Any) -> bool:
    """Whether the value of a field that is not served is more than an empty or a harmless one."""
    if value is None or value is False or value in ("", [], {}):
        return name in MEANT and value == MEANT[name]
    return value not in HARMLESS.get(name, ())


def _check(request: GenerationRequest) -> None:
    """What holds between fields of either request."""
    check_served(request)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options: only allowed with stream: true")
    lengths = {name: value for name in LENGTHS if (value := getattr(request, name)) is not None}
    if len(set(lengths.values())) > 1:
        first, second, *_ = lengths
        raise invalid(second, f"{second}: differs from {first}; give one of the two")
    for name, other in ALIASES:
        if getattr(request, name) is not None and getattr(request, other) is not None:
            raise invalid(other, f"{other}: another name of {name}; give one of the two")
    if request.prompt_logprobs is not None and request.streams:
        raise invalid("prompt_logprobs", "prompt_logprobs: not in a stream")


def _check_chat(request: ChatRequest) -> None:
    _check(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs: only allowed with logprobs: true")
    if request.add_generation_prompt and request.continue_final_message:
        raise invalid("continue_final_message", "continue_final_message: not together with add_generation_prompt")
    check_tools(request.tools, request.tool_choice)
    for index, message in enumerate(request.messages):
        check_message(f"messages[{index}]", message, "messages")
