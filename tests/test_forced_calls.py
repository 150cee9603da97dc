"""Calls that are demanded, with a real model that would never make one: a tiny random one, in a real server."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import CHATML, IM_END, VOCAB_SIZE, write_byte_tokenizer

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--running_max_req_size", "16")
pytestmark = pytest.mark.long
TEMPLATE = "{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}" + CHATML
SIZES = {"type": "string", "enum": ["small", "large"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "order", "parameters": {
        "type": "object", "properties": {"size": SIZES, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["size", "count"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "cancel", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip


@pytest.fixture(scope="module", params=["hermes", "llama3", "mistral"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    write_byte_tokenizer(folder, TEMPLATE)
    with Server("--model_dir", str(folder), *FLAGS, "--tool_call_parser", request.param) as running:
        yield running


def check(choice: Any, *names: str) -> int:
    """The choice has valid calls of these functions and nothing else; how many."""
    message = choice.message
    assert not message.content and choice.finish_reason == "tool_calls"
    for call in message.tool_calls:
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "cancel":
            assert arguments == {}
        else:
            assert set(arguments) == {"size", "count"}
            assert arguments["size"] in ("small", "large") and 1 <= arguments["count"] <= 99
    return len(message.tool_calls)


def test_calls_that_are_demanded_are_always_made(server: Server) -> None:
    """The end is likely wherever it is allowed: not before a call is complete."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        options: Any = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": "hi"}]}
        options |= {"tools": TOOLS, "max_tokens": 1000, "logit_bias": {str(IM_END): 4}}
        counts = set()
        for seed in range(2):
            whole = client.chat.completions.create(**options, tool_choice="required", seed=seed, n=3)
            counts |= {check(choice, "order", "cancel") for choice in whole.choices}
            named: Any = {"type": "function", "function": {"name": "order"}}
            with client.chat.completions.stream(**options, tool_choice=named, seed=seed) as stream:
                assert check(stream.get_final_completion().choices[0], "order") == 1
            one = client.chat.completions.create(
                **options, tool_choice="required", seed=seed, parallel_tool_calls=False
            )
            assert check(one.choices[0], "order", "cancel") == 1
        assert 1 in counts


MARKED = {
    "mistral": (TEMPLATE, ("[TOOL_CALLS]",)),
    "mistral with [ARGS]": (TEMPLATE + "{# [ARGS] #}", ("[TOOL_CALLS]", "[ARGS]")),
    "llama3": (TEMPLATE, ("<|python_tag|>",)),
    "glm": (TEMPLATE, ("<tool_call>", "</tool_call>", "</arg_value>")),
}
STRICT: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]


@pytest.fixture(scope="module", params=sorted(MARKED))
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    """A format, and a model that has special tokens for its marks, the first of them as VOCAB_SIZE."""
    folder, (template, marks) = tmp_path_factory.mktemp("tiny"), MARKED[request.param]
    write_tiny_model(folder, vocab_size=VOCAB_SIZE + len(marks), max_position_embeddings=2048)
    write_byte_tokenizer(folder, template, marks)
    with Server("--model_dir", str(folder), *FLAGS, "--tool_call_parser", request.param.split()[0]) as running:
        yield request.param, running


@pytest.mark.parametrize("choice", ["required", "named", "auto"])
def test_calls_begin_with_the_special_token_that_is_their_mark(marked: tuple[str, Server], choice: str) -> None:
    """Where the mark is likely it comes by itself too, and then a strict function is called as its schema says."""
    format, server = marked
    named = {"type": "function", "function": {"name": "order"}}
    mark, most = MARKED[format][1][0], 0
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        options: Any = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": "hi"}]}
        options |= {"tools": STRICT, "tool_choice": named if choice == "named" else choice, "max_tokens": 1500}
        options |= {"logit_bias": {str(IM_END): 4, str(VOCAB_SIZE): 8}, "parallel_tool_calls": choice != "auto"}
        for seed in range(2):
            whole = client.chat.completions.create(**options, seed=seed, extra_body={"return_token_ids": True})
            with client.chat.completions.stream(**options, seed=seed) as stream:
                assert said(stream.get_final_completion().choices[0]) == said(whole.choices[0])
            content, reason, calls = said(whole.choices[0])
            ids = whole.choices[0].model_dump()["token_ids"]
            assert mark not in content and mark.encode() not in bytes(id for id in ids if id < 256)
            assert (reason == "tool_calls") == bool(calls) and (calls or choice == "auto")
            assert ids.count(VOCAB_SIZE) > 0 or not calls or (format == "llama3" and choice != "auto")
            assert choice == "auto" or not content
            for name, arguments in calls:
                if name == "order":
                    assert set(arguments) == {"size", "count"} and 1 <= arguments["count"] <= 99
                    assert arguments["size"] in ("small", "large")
                else:
                    assert (name, arguments) == ("cancel", {}) and choice != "named"
            most = max(most, len(calls))
    assert most > 0


def said(choice: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    message = choice.message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    return message.content or "", choice.finish_reason, calls
