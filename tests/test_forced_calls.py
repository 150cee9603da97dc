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
