"""Every refusal comes before a 200, in one shape, names the field, and leaves nothing behind."""

from typing import Any

import pytest
from stand import CONTEXT, Runner

from aiollm.api.field_texts import TEXTS
from aiollm.api.schema import MEANT, ChatRequest, CompletionRequest, unserved

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
TRAILING = b'{"prompt":"x","messages":[{"role":"user","content":"x"}]}x'
DEEP = b"[" * 100_000 + b"]" * 100_000

NESTED: Any = {"type": "string"}
for _ in range(100):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}
BAD_SCHEMAS: list[Any] = [
    NESTED, {"type": "wizard"}, {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:1/schema.json"}, {"type": "string", "pattern": "(?<=a)b"}, {"enum": []}, False,
    {"enum": [f"v{i}" for i in range(20_000)]}, {"not": {}}, {"type": "string", "pattern": "["},
    {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"const": j}}} for j in range(4)]} for i in range(10)]},
]  # fmt: skip
BAD_REGEXES = ["[", "(a", "(?=a)b", r"(a)\1", "(" * 5000 + "a" + ")" * 5000, "a" * 140_000]
BAD_GRAMMARS = ["", "start: nothing", "root ::= nothing", "nonsense", 'start: "' + "a" * 140_000 + '"',
                "start: " + "(" * 20_000 + '"a"' + ")" * 20_000]  # fmt: skip

# field, values that are refused
BOTH: list[tuple[str, list[Any]]] = [
    ("temperature", [-1, 2.1, "0.7", True, [], {}, -1e-9, 1e300]),
    ("do_sample", ["no", 0]),
    ("top_p", [0, 1.1, -0.1, "1", False]),
    ("top_k", [-2, 2**40, 1.5, "5", True, 2**70]),
    ("min_p", [-0.1, 2, "0"]),
    ("presence_penalty", [-3, 3, "0"]),
    ("frequency_penalty", [-2.1, 2.1, {}]),
    ("repetition_penalty", [0, -1, 10.5, "1"]),
    ("repeat_penalty", [0, 11]),
    ("max_tokens", [-1, 2**31, 2**63, 1e10, "10", 1.0, True, 0]),
    ("max_completion_tokens", [-1, "x", 1.5, 0]),
    ("max_new_tokens", [-1, "x", 0]),
    ("min_tokens", [-1, 2**31, "1"]),
    ("min_new_tokens", [-1, 10**6]),
    ("n", [0, -1, 129, 10**9, 2**70, "2", 1.0]),
    ("seed", ["1", 2**63, -(2**63) - 1, 1.5, True]),
    ("stop", ["", [""], ["a"] * 33, "x" * 1025, [5], 5, {}, [["a"]], ["x", "x" * 1025]]),
    ("stop_token_ids", [[-1], [259], ["a"], 5, [1.5], [2**40], [1] * 257]),
    ("logit_bias", [{"abc": 1}, {"-1": 1}, {"259": 1}, {"1": 101}, {"1": -101}, {"1": "x"}, [1], "x",
                    {str(i): 1 for i in range(1025)}]),
    ("stream", ["true", 1, 0]),
    ("stream_options", [{"include_usage": True}, "x", []]),
    ("ignore_eos", ["no", 0]),
    ("include_stop_str_in_output", [1]),
    ("skip_special_tokens", ["x"]),
    ("cache_salt", ["", 5, "x" * 257]),
    ("extra_key", ["", ["a"], "x" * 257]),
    ("model", [5, ["tiny"]]),
    ("response_format", [
        {}, "text", {"type": "structural_tag"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}}, {"type": 5}, {"schema": 5},
        *({"type": "json_object", "schema": schema} for schema in BAD_SCHEMAS[:2]),
        *({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} for schema in BAD_SCHEMAS),
    ]),
    ("guided_json", [5, [], "x", "[1]", *BAD_SCHEMAS]),
    ("json_schema", [5, "{", *BAD_SCHEMAS]),
    ("guided_regex", [5, *BAD_REGEXES]),
    ("regex", BAD_REGEXES),
    ("guided_grammar", [5, *BAD_GRAMMARS]),
    ("ebnf", BAD_GRAMMARS),
    ("grammar", [{"type": "json", "value": {}}, "nonsense"]),
    ("guided_decoding", [{"regex": "a"}]),
    ("guided_whitespace_pattern", [" ", ""]),
    ("guided_choice", [[], "a", [""], [5], ["x" * 200_000]]),
    ("structured_outputs", [
        "x", {"regex": "["}, {"json": {"type": "wizard"}}, {"choice": []}, {"grammar": ""}, {"structural_tag": "x"},
        {"whitespace_pattern": " "}, {"regex": "a", "json": {}}, {"choice": ["a"], "json_object": True},
        {}, {"json": None}, {"json_schema": {}}, {"json": {}, "disable_any_whitespace": True},
        {"json": {}, "disable_additional_properties": True},
    ]),
    ("allowed_token_ids", [[], [-1], [259], ["a"], 5, [1] * 16385]),
    ("bad_words", ["a", [""], [5], ["a"] * 257, ["x" * 257]]),
    ("prompt_logprobs", [21, -1, -2, "1", True]),
    ("truncate_prompt_tokens", [0, -2, CONTEXT + 1, "1"]),
    ("truncation_side", ["middle", 1]),
    ("request_id", ["", "a b", "x" * 129, "ü", "a\n", 5]),
    ("rid", ["", ["a"]]),
    ("no_stop_trim", [1]),
    ("use_beam_search", [True]),
    ("prompt_embeds", ["x", ["x"]]),
    ("input_embeds", [[[0.5]]]),
    ("input_ids", [[65], [[65]]]),
    ("return_hidden_states", [True]),
    ("custom_logit_processor", ["x"]),
    ("logits_processors", [["x"]]),
    ("lora_path", ["x", "none"]),
    ("adapter_id", ["x"]),
    ("stop_regex", ["a+"]),
    ("kv_transfer_params", [{"do_remote_decode": True}]),
    ("data_parallel_rank", [1]),
    ("vllm_xargs", [{"a": 1}]),
    ("mirostat", [2]),
    ("n_predict", [5, -1, 0]),
    ("top_n_sigma", [1.5]),
    ("dynatemp_range", [0.5]),
    ("dry_multiplier", [0.8]),
    ("xtc_probability", [0.5]),
    ("typical_p", [0.9]),
    ("watermark", [True]),
]  # fmt: skip
ONLY_CHAT: list[tuple[str, list[Any]]] = [
    ("logprobs", [1, "true"]),
    ("best_of", [2, 0]),
    ("modalities", [["text", "audio"], ["audio"]]),
    ("web_search_options", [{}]),
    ("top_logprobs", [21, -1, 5, 0, "1"]),
    ("messages", [
        None, [], {}, "hi", [5], [{}], [{"content": "x"}], [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": "wizard", "content": "x"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}],
        [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
        [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}],
        [{"role": "assistant", "content": [{"type": "refusal", "text": "no"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}], [{"role": "user", "content": ["x", 5]}],
        [{"role": "user", "content": [{"type": "input_text"}]}],
        [{"role": "assistant", "content": [{"type": "output_text", "refusal": "no"}]}],
        [{"role": "tool", "content": "x"}], [USER, {"role": "assistant", "tool_calls": "x"}],
        [{"role": "assistant", "tool_calls": [5]}], [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
        [{"role": "user", "content": "x", "name": 5}],
    ]),
    ("chat_template_kwargs", [{"messages": "x"}, {"bos_token": "x"}, {"a": [1]}, {"a": {}}, "x", {"a b": 1}]),
    ("chat_template", ["{{ messages }}"]),
    ("documents", [[{"text": "x"}], "x", [5], [{"a": [1]}]]),
    ("role_settings", [{"user_name": "x"}, "x", {"a": [1]}]),
    ("character_settings", [[{"role_name": "x"}], {}, [5]]),
    ("audio", [{"voice": "x"}]),
    ("echo", [True, "x"]),
    ("tools", [
        [], "x", {}, [{}], [TOOL] * 2, [TOOL, 5], [{"type": "code", "function": {"name": "f"}}], [{"type": "function"}],
        [{"function": {"name": name}} for name in map(str, range(513))],
        *([{"function": {"name": name}}] for name in ("", "a b", "f\n", "é", "x" * 129, "x" * 10**5, 5)),
        *([{"function": {"name": "f", "parameters": value}}] for value in ([], "x", 5, True)),
        [{"type": "function", "function": {"name": "f", "description": "x" * 2**19}}], [TOOL],
    ]),
    ("tool_choice", ["auto", "required", {}, "any", {"type": "function", "function": {"name": "f"}}]),
    ("parallel_tool_calls", ["no", 1]),
    ("functions", [[{"name": "f"}]]),
    ("function_call", ["auto", {"name": "f"}]),
    ("thinking_token_budget", [-2, "1", 1.5, 2**31, 0, 100]),
    ("include_reasoning", ["no"]),
    ("separate_reasoning", [1]),
    ("stream_reasoning", [False, "x"]),
    ("reasoning_effort", [5, ["low"]]),
    ("continue_final_message", ["x", 1]),
    ("add_generation_prompt", ["x"]),
]  # fmt: skip
ONLY_TEXT: list[tuple[str, list[Any]]] = [
    ("prompt", [
        None, "", [], [[]], [""], ["a", ""], [[1], []], 5, True, {}, [-1], [259], [2**31], [2**63], [2**70], [1.5],
        [True], [[[1]]], ["a", 5], ["a", [5]], [5, [5]], [None], [[259]], [["a"]],
    ]),
    ("logprobs", [21, -1, True, "1", 1.5]),
    ("echo", ["x", 1]),
    ("best_of", [129, 0, -1, "x", 1.5]),
    ("suffix", ["x", "none"]),
    ("top_logprobs", [5, -1]),
]  # fmt: skip


def table(fields: list[tuple[str, list[Any]]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}={str(value)[:40]}") for field, values in fields for value in values]


def refused(served: Runner, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
    """The error in the answer, after checking its shape."""
    got, answer = served.run(served.stand.post(path, body, **headers))
    assert got == status, answer
    assert list(answer) == ["error"] and sorted(answer["error"]) == ["code", "message", "param", "type"]
    error: dict[str, Any] = answer["error"]
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["code"], str)
    assert error["type"] == "invalid_request_error"
    assert served.stand.workers.launched == 0
    return error


@pytest.mark.parametrize(("field", "value"), table(BOTH + ONLY_CHAT))
def test_a_bad_field_of_a_chat_request_is_named(served: Runner, field: str, value: Any) -> None:
    error = refused(served, CHAT, {"messages": [USER], field: value})
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_what_only_the_server_may_set_is_not_allowed(served: Runner, path: str) -> None:
    assert refused(served, path, {"messages": [USER], "chat_template": "x"})["code"] == "not_allowed"
    for name in ("messages", "tools", "bos_token", "add_generation_prompt", "tokenize", "chat_template", "return_dict"):
        error = refused(served, path, {"messages": [USER], "chat_template_kwargs": {name: True}})
        assert (error["code"], error["param"]) == ("not_allowed", "chat_template_kwargs")
        assert error["message"].startswith(f"chat_template_kwargs: {name!r}")
    for kwargs in ({"a b": 1}, {"a": []}):
        error = refused(served, path, {"messages": [USER], "chat_template_kwargs": kwargs})
        assert error["code"] == "invalid_value"


@pytest.mark.parametrize(("field", "value"), table(BOTH + ONLY_TEXT))
def test_a_bad_field_of_a_completion_request_is_named(served: Runner, field: str, value: Any) -> None:
    error = refused(served, TEXT, {"prompt": "hi", field: value})
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[]", b"null", b'"x"', b"5", TRAILING,
        b"\xef\xbb\xbf{}", b"\xff\xfe", b"{'a':1}", b'{"a":1,}',
        b'{"a":NaN}', b'{"a":Infinity}', b'{"temperature":NaN}', b'{"temperature":-Infinity}', b'{"user":"\xff"}',
        b'{"prompt":"caf\xe9"}', b'{"prompt":"\\ud800"}', b'{"messages":[{"role":"user","content":"\\udfff"}]}', DEEP,
        b'{"x":' + DEEP + b"}", b'{"audio":' + DEEP + b"}", b'{"a":' * 100_000, b'{"prompt":"\x01"}',
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_what_is_not_json_is_refused(served: Runner, path: str, body: bytes) -> None:
    error = refused(served, path, body, **{"Content-Type": "application/json"})
    assert error["code"] == "invalid_json" and error["param"] is None


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "1" + "0" * 400 + ".5"])
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "seed"])
def test_numbers_beyond_every_type_are_refused_by_name(served: Runner, field: str, number: str) -> None:
    error = refused(served, TEXT, f'{{"prompt":"x","{field}":{number}}}'.encode())
    assert error["param"] == field


def test_a_missing_field_is_named(served: Runner) -> None:
    assert refused(served, CHAT, {})["param"] == "messages"
    assert refused(served, TEXT, {"messages": [USER]})["param"] == "prompt"


def test_a_message_at_fault_is_named_by_its_index(served: Runner) -> None:
    error = refused(served, CHAT, {"messages": [USER, {"role": "wizard", "content": "x"}]})
    assert "messages[1].role" in error["message"]
    assert "takes text only" in refused(
        served, CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    )["message"]  # fmt: skip


def test_a_limit_is_named(served: Runner) -> None:
    assert "<= 2.0" in refused(served, CHAT, {"messages": [USER], "temperature": 5})["message"]
    assert "128" in refused(served, CHAT, {"messages": [USER], "n": 129})["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "regex": "a"}, "regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"regex": "a", "regular_constraint": "a"}, "regular_constraint"),
        ({"guided_choice": ["a"], "allowed_token_ids": [97]}, "allowed_token_ids"),
        ({"ebnf": 'root ::= "a"', "ignore_eos": True}, "ignore_eos"),
        ({"allowed_token_ids": [65, 66], "bad_words": ["A", "B", "C"]}, "bad_words"),
        ({"allowed_token_ids": [66, 258], "stop_token_ids": [66], "min_tokens": 2}, "min_tokens"),
    ],
    ids=str,
)
def test_two_constraints_at_once_are_refused(served: Runner, fields: dict[str, Any], param: str) -> None:
    error = refused(served, TEXT, {"prompt": "hi", **fields})
    assert error["param"] == param and error["message"].startswith(param)


EMPTY: tuple[Any, ...] = (None, False, "", [], {})


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatRequest), (TEXT, CompletionRequest)])
@pytest.mark.parametrize("value", EMPTY, ids=str)
def test_empty_values_of_fields_that_are_not_served_ask_for_nothing(
    served: Runner, path: str, kind: type[ChatRequest | CompletionRequest], value: Any
) -> None:
    fields = {name: value for name in unserved(kind) if MEANT.get(name, ...) != value}
    assert len(fields) > 20
    body = {"prompt": "hi"} if kind is CompletionRequest else {"messages": [USER]}
    status, answer = served.run(served.stand.post(path, {**body, "max_tokens": 1, **fields}))
    assert status == 200, answer


def test_fields_that_contradict_each_other_are_refused(served: Runner) -> None:
    for body in [
        {"max_tokens": 5, "max_completion_tokens": 6},
        {"max_tokens": 5, "max_new_tokens": 6},
        {"min_tokens": 6, "max_tokens": 5},
        {"min_tokens": 1, "min_new_tokens": 1},
        {"min_new_tokens": 6, "max_new_tokens": 5},
        {"repetition_penalty": 1.1, "repeat_penalty": 1.2},
        {"include_stop_str_in_output": True, "no_stop_trim": False},
        {"request_id": "a", "rid": "a"},
        {"cache_salt": "a", "extra_key": "a"},
        {"stream": True, "prompt_logprobs": 0},
        {"add_generation_prompt": True, "continue_final_message": True},
        {"top_logprobs": 2, "logprobs": False},
        {"stream": False, "stream_options": {"include_usage": True}},
    ]:
        assert refused(served, CHAT, {"messages": [USER], **body})["param"] in body


def test_an_unknown_model_is_not_found(served: Runner) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "x"})):
        error = refused(served, path, {**body, "model": "gpt-99"}, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("prompt", "asked"), [(CONTEXT, None), (CONTEXT + 1, None), (CONTEXT, 2), (5000, 1), (1, CONTEXT + 1)]
)
def test_what_exceeds_the_context_is_refused_in_the_words_that_clients_look_for(
    served: Runner, prompt: int, asked: int | None
) -> None:
    error = refused(served, TEXT, {"prompt": [65] * prompt, "max_tokens": asked})
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert f"this model's maximum context length is {CONTEXT} tokens" in error["message"].lower()
    total = prompt + (asked or 1)
    output = asked or 1
    assert f"requested {total} tokens ({prompt} in the prompt, {output} in the completion)" in error["message"]
    chat = refused(served, CHAT, {"messages": [{"role": "user", "content": "x" * prompt}], "max_tokens": CONTEXT + 1})
    assert chat["code"] == "context_length_exceeded" and "in the messages" in chat["message"]


def test_a_prompt_one_short_of_the_context_gets_one_token(served: Runner) -> None:
    for asked in (None, 1, 2, CONTEXT):
        status, answer = served.run(served.stand.post(TEXT, {"prompt": [65] * (CONTEXT - 1), "max_tokens": asked}))
        assert status == 200
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")


def test_an_answer_gets_what_is_left_of_the_context(served: Runner) -> None:
    body = {"messages": [USER], "max_completion_tokens": CONTEXT, "ignore_eos": True}
    status, answer = served.run(served.stand.post(CHAT, body))
    assert status == 200 and answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


def test_too_many_choices_over_all_prompts_are_refused(served: Runner) -> None:
    error = refused(served, TEXT, {"prompt": ["x"] * 100, "n": 100})
    assert error["param"] == "n"
    error = refused(served, TEXT, {"prompt": ["x"] * 1025})
    assert error["param"] == "prompt" and error["message"].startswith("prompt: at most 1024")
    assert all("1,024" in TEXTS[name] for name in ("n", "prompt", "input"))


def test_the_last_of_several_prompts_spoils_all_of_them(served: Runner) -> None:
    refused(served, TEXT, {"prompt": [[65], [65], [300]]})


@pytest.mark.parametrize("streams", [True, False])
def test_refusals_of_streams_are_no_streams(served: Runner, streams: bool) -> None:
    refused(served, CHAT, {"messages": [USER], "stream": streams, "temperature": 9})
    refused(served, TEXT, {"prompt": [65] * 600, "stream": streams})


def test_unknown_fields_are_ignored(served: Runner) -> None:
    extra = {f"unknown_{i}": {"a": [i]} for i in range(10_000)}
    status, _ = served.run(served.stand.post(CHAT, {"messages": [USER], "max_tokens": 1, **extra}))
    assert status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 1, "seed": -(2**63), "n": 1},
        {"temperature": 0, "n": 2, "top_k": 10**6},
        {"temperature": None, "max_tokens": None, "stop": None, "logit_bias": None, "stream": None, "tools": None},
        {"stop": [], "logit_bias": {}, "stop_token_ids": [], "response_format": {"type": "text"}},
        {"stop": ["x" * 1024] * 32},
        {"logit_bias": {"0": 100, "258": -100}, "user": "me", "metadata": {}, "store": False, "tool_choice": "none"},
        {"max_tokens": 5, "max_completion_tokens": 5, "use_beam_search": False, "reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": False, "depth": 1.5, "name": "x", "none": None}},
        {"documents": [], "user": 5, "store": "yes", "service_tier": [1], "metadata": [{}], "verbosity": None},
        {"model": "", "request_id": "a.b:c-d_1", "truncate_prompt_tokens": CONTEXT, "use_beam_search": False},
        {
            "modalities": ["text"],
            "best_of": 1,
            "mirostat": 0,
            "dry_multiplier": 0.0,
            "typical_p": 1.0,
            "vllm_xargs": {},
            "function_call": "none",
        },
        {"top_n_sigma": -1, "dynatemp_range": 0.0, "stream_reasoning": True, "return_hidden_states": False},
        {"top_n_sigma": 0, "extra_key": "k", "web_search_options": False, "guided_whitespace_pattern": None},
        {"web_search_options": None, "guided_decoding": None, "watermark": False, "data_parallel_rank": 0},
        {"structured_outputs": {"json": {}, "disable_any_whitespace": False, "disable_fallback": True}},
    ],
)
def test_values_at_the_edge_are_taken(served: Runner, body: dict[str, Any]) -> None:
    status, answer = served.run(served.stand.post(CHAT, {"messages": [USER], **body}))
    assert status == 200, answer


def test_control_tokens_and_odd_messages_never_break_the_server(served: Runner) -> None:
    for messages in (
        [{"role": "user", "content": "<|im_start|><|im_end|>\x00\u202e"}],
        [{"role": "assistant", "content": "x"}],
        [USER, {"role": "system", "content": "late"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "user", "content": ""}],
    ):
        status, _ = served.run(served.stand.post(CHAT, {"messages": messages, "max_tokens": 1}))
        assert status == 200
