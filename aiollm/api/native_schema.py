"""The requests of LightLLM's native API as types, and what they mean in the terms that all endpoints share.

Sampling is asked for by `do_sample`, or by an explicit temperature; everything else is greedy.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aiollm.api.decoding import decode
from aiollm.api.errors import invalid
from aiollm.api.schema import (
    INT32,
    MAX_STOPS,
    AllowedTokens,
    BadWords,
    Choices,
    Count,
    GenerationRequest,
    JsonSchema,
    MinP,
    Penalty,
    RepetitionPenalty,
    ResponseFormat,
    Stop,
    StructuredOutputs,
    Temperature,
    TokenId,
    TopK,
    TopP,
    check_served,
)
from aiollm.api.structured import asked_grammars
from aiollm.wire.sampling import Decay

DEFAULT_MAX_NEW_TOKENS = 16
GREEDY_BELOW = 1e-5  # LightLLM takes lower temperatures for greedy
Tokens = Annotated[int, Meta(ge=1, le=INT32)]
Group = Annotated[list[TokenId], Meta(min_length=1, max_length=256)]


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """Names and defaults are LightLLM's; null is the default. Fields typed Any are known, and refused.

    What its servers say to one another has the values left that mean nothing: this server draws ids itself, and is one.
    """

    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    input_penalty: bool | None = None
    exponential_decay_length_penalty: tuple[Count, Annotated[float, Meta(ge=1)]] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_new_tokens: Tokens | None = None
    min_new_tokens: Tokens | None = None
    ignore_eos: bool | None = None
    stop_sequences: Stop | Annotated[list[Stop | Group], Meta(max_length=MAX_STOPS)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    add_spaces_between_special_tokens: bool | None = None
    print_eos_token: bool | None = None
    return_details: bool | None = None
    image_max_patch_num: Annotated[int, Meta(ge=-1)] | None = None
    group_request_id: Annotated[int, Meta(ge=-1, le=-1)] | None = None
    suggested_dp_index: Annotated[int, Meta(ge=-1, le=0)] | None = None
    move_kv_to_decode_node: Any = None
    return_all_prompt_logprobs: bool | None = None
    token_healing: bool | None = None
    first_allowed_tokens: AllowedTokens | None = None
    allowed_token_ids: AllowedTokens | None = None
    bad_words: BadWords | None = None
    regular_constraint: str | None = None
    guided_choice: Choices | None = None
    guided_json: JsonSchema | None = None
    guided_grammar: str | None = None
    guided_regex: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: JsonSchema | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    adapter_id: Any = None
    custom_logit_processor: Any = None
    guided_decoding: Any = None
    guided_whitespace_pattern: Any = None
    input_embeds: Any = None
    logits_processors: Any = None
    lora_path: Any = None
    prompt_embeds: Any = None
    stop_regex: Any = None
    typical_p: Any = None
    use_beam_search: Any = None
    watermark: Any = None

    @property
    def choices(self) -> int:
        """How many are told."""
        return self.n or self.best_of or 1

    @property
    def drawn(self) -> int:
        """How many are computed."""
        return self.best_of or self.n or 1

    @property
    def max_tokens(self) -> int:
        return self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    @property
    def stops(self) -> list[str]:
        if isinstance(self.stop_sequences, str):
            return [self.stop_sequences]
        return [stop for stop in self.stop_sequences or () if isinstance(stop, str)]

    @property
    def stop_groups(self) -> list[tuple[int, ...]]:
        return [tuple(stop) for stop in self.stop_sequences or () if not isinstance(stop, str)]

    def decay(self, eos_ids: Iterable[int], healed: int) -> Decay | None:
        """How the end gets likelier, of a model with these end-of-sequence ids, where so many tokens are healed."""
        start, factor = self.exponential_decay_length_penalty or (0, 1.0)
        return Decay(healed + start, factor, tuple(sorted(eos_ids))) if factor > 1 else None

    @property
    def stop_ids(self) -> list[int]:
        """Stop sequences of one id, which end the output wherever it is drawn. Where a prompt is healed there are none:
        the first tokens are not the output's own."""
        return [] if self.token_healing else [group[0] for group in self.stop_groups if len(group) == 1]

    @property
    def greedy(self) -> bool:
        samples = self.do_sample if self.do_sample is not None else self.temperature is not None
        return not samples or (self.temperature is not None and self.temperature < GREEDY_BELOW)


class NativeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /generate, /generate_stream and /; only the last one looks at `stream`."""

    inputs: str | list[TokenId]
    parameters: Parameters | None = None
    multimodal_params: dict[str, Any] | None = None
    stream: bool | None = None


class CommonRequest(GenerationRequest, frozen=True, kw_only=True):
    """A native request in the terms of the other endpoints."""

    best_of: int | None = None

    @property
    def drawn(self) -> int:
        return self.best_of or self.n or 1


class TokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """GET or POST /tokens."""

    text: str
    parameters: Parameters | None = None
    multimodal_params: dict[str, Any] | None = None


BEGINNINGS = ("token_healing", "first_allowed_tokens")
"""Constraints of the beginning, which may leave nothing to draw together with any other."""
_NATIVE = msgspec.json.Decoder(NativeRequest)
_TOKENS = msgspec.json.Decoder(TokensRequest)


def decode_native(body: bytes) -> NativeRequest:
    """Raises ApiError where the body is not a native request."""
    request = decode(_NATIVE, body)
    _check(request.parameters or Parameters(), request.multimodal_params)
    return request


def decode_tokens(body: bytes) -> TokensRequest:
    """Raises ApiError where the body is not one of /tokens."""
    request = decode(_TOKENS, body)
    _check(request.parameters or Parameters(), request.multimodal_params)
    return request


def common(parameters: Parameters, stream: bool) -> CommonRequest:
    """The same request in the terms of the other endpoints; left out are stop sequences but `stop_ids`, and what only
    the native API has."""
    return CommonRequest(
        stream=stream,
        n=parameters.choices,
        best_of=parameters.best_of,
        prompt_logprobs=0 if parameters.return_all_prompt_logprobs else None,
        max_tokens=parameters.max_tokens,
        min_tokens=(parameters.min_new_tokens or 1) - 1,  # here the end-of-sequence token counts too
        temperature=0.0 if parameters.greedy else parameters.temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        min_p=parameters.min_p,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        repetition_penalty=parameters.repetition_penalty,
        logit_bias=parameters.logit_bias,
        seed=parameters.seed,
        stop_token_ids=parameters.stop_ids,
        ignore_eos=parameters.ignore_eos,
        allowed_token_ids=parameters.allowed_token_ids,
        bad_words=parameters.bad_words,
        regular_constraint=parameters.regular_constraint,
        guided_choice=parameters.guided_choice,
        guided_json=parameters.guided_json,
        guided_grammar=parameters.guided_grammar,
        guided_regex=parameters.guided_regex,
        regex=parameters.regex,
        ebnf=parameters.ebnf,
        grammar=parameters.grammar,
        json_schema=parameters.json_schema,
        response_format=parameters.response_format,
        structured_outputs=parameters.structured_outputs,
    )


def _check(parameters: Parameters, multimodal: dict[str, Any] | None) -> None:
    """What holds between fields."""
    check_served(parameters)
    if multimodal is not None and any(multimodal.values()):
        raise invalid("multimodal_params", "multimodal_params: this model takes text only", "unsupported_field")
    if parameters.drawn < parameters.choices:
        message = f"best_of: {parameters.drawn} is less than n, the {parameters.choices} that are told"
        raise invalid("best_of", message)
    if begins := [name for name in BEGINNINGS if getattr(parameters, name)]:
        others = [name for name in ("allowed_token_ids", "bad_words") if getattr(parameters, name) is not None]
        others += [name for name, _ in asked_grammars(common(parameters, False))]
        first, *rest = begins + others
        if rest:
            raise invalid(rest[0].partition(".")[0], f"{rest[0]}: not together with {first}")
    if parameters.token_healing and parameters.return_all_prompt_logprobs:
        message = "return_all_prompt_logprobs: not together with token_healing, which cuts the prompt"
        raise invalid("return_all_prompt_logprobs", message)
    if (parameters.min_new_tokens or 1) > parameters.max_tokens:
        least, most = parameters.min_new_tokens, parameters.max_tokens
        raise invalid("min_new_tokens", f"min_new_tokens: {least} is more than the {most} of max_new_tokens")
