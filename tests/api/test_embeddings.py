"""OpenAI's endpoint of embeddings: its shape, and what it refuses. What the vectors are: tests/test_embeddings.py."""

import base64
import json
import logging
from typing import Any

import numpy as np
import openai
import pytest
from echo_workers import HIDDEN, hidden_of
from stand import CONTEXT, Runner
from tiny_tokenizer import VOCAB_SIZE

from aiollm.api.embeddings import unit

PATH = "/v1/embeddings"


def ask(served: Runner, body: Any) -> Any:
    status, answer = served.run(served.stand.post(PATH, body))
    assert status == 200, answer
    return answer


def vector(text: str, count: int = HIDDEN) -> Any:
    return pytest.approx(unit(np.array(hidden_of(list(text.encode()))[:count], np.float32)), abs=1e-6)


def test_an_input_has_a_vector_of_length_1(served: Runner) -> None:
    answer = ask(served, {"input": "hi", "model": "org/tiny"})
    assert answer | {"data": 0} == {
        "object": "list", "data": 0, "model": "org/tiny", "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }  # fmt: skip
    (found,) = answer["data"]
    assert found | {"embedding": 0} == {"object": "embedding", "index": 0, "embedding": 0}
    assert found["embedding"] == vector("hi")
    assert np.linalg.norm(found["embedding"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (["a", "bcd", "a"], ["a", "bcd", "a"]),
        ([98, 99], ["bc"]),
        ([[98, 99], [97]], ["bc", "a"]),
        (["x" * n for n in range(1, 40)], ["x" * n for n in range(1, 40)]),
    ],
)
def test_inputs_of_every_form_come_back_in_order(served: Runner, given: Any, texts: list[str]) -> None:
    answer = ask(served, {"input": given})
    assert [found["index"] for found in answer["data"]] == list(range(len(texts)))
    assert [found["embedding"] for found in answer["data"]] == [vector(text) for text in texts]
    assert answer["usage"]["total_tokens"] == len("".join(texts))


def test_fewer_dimensions_are_scaled_again_and_base64_holds_the_same(served: Runner) -> None:
    short = ask(served, {"input": "hello", "dimensions": 3})["data"][0]["embedding"]
    assert short == vector("hello", 3)
    text = ask(served, {"input": "hello", "dimensions": 3, "encoding_format": "base64"})["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4") == pytest.approx(short)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, "jk"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "ab"),
        ({"truncate_prompt_tokens": CONTEXT, "truncation_side": "right"}, ("abc" * CONTEXT)[:CONTEXT]),
        ({"truncate_prompt_tokens": -1}, ("abc" * CONTEXT + "jk")[-CONTEXT:]),
    ],
)
def test_an_input_is_cut_to_what_the_request_says(served: Runner, fields: dict[str, Any], kept: str) -> None:
    (found,) = ask(served, {"input": "abc" * CONTEXT + "jk", **fields})["data"]
    assert found["embedding"] == vector(kept)


def test_values_that_ask_for_nothing_are_taken(served: Runner) -> None:
    nothing = {"normalize": True, "use_activation": True, "embed_dtype": "float32", "lora_path": None}
    assert ask(served, {"input": "a", **nothing})["data"][0]["embedding"] == vector("a")


def test_a_user_is_told_of_in_the_log(served: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")
    ask(served, {"input": "a", "user": "me"})
    ask(served, {"input": "a", "user": None})
    first, second = map(json.loads, caplog.messages)
    assert first["ignored"] == ["user"] and "ignored" not in second


def test_openai_s_client_reads_them(served: Runner) -> None:
    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=served.stand.url + "/v1", api_key="none") as client:
            return await client.embeddings.create(model="tiny", input=["a", "b"])

    answer = served.run(main())
    assert [found.embedding for found in answer.data] == [vector("a"), vector("b")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": [[-1]]}, "input"),
        ({"input": ["a"] * 1025}, "input"),
        ({"input": "x" * (CONTEXT + 1)}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": HIDDEN + 1}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "prompt_embeds": "x"}, "prompt_embeds"),
        ({"input": "a", "input_embeds": [[0.5]]}, "input_embeds"),
        ({"input": "a", "lora_path": "x"}, "lora_path"),
        ({"input": "a", "adapter_id": 1}, "adapter_id"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "use_activation": False}, "use_activation"),
    ],
)
def test_what_cannot_be_embedded_is_refused(served: Runner, body: Any, param: str) -> None:
    status, answer = served.run(served.stand.post(PATH, body))
    assert (status, answer["error"]["param"]) == (400, param)
    assert served.stand.workers.launched == 0


def test_another_model_is_not_found(served: Runner) -> None:
    status, answer = served.run(served.stand.post(PATH, {"input": "a", "model": "other"}))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_model_without_scores_says_so_whatever_is_asked(served: Runner) -> None:
    for chat in ("x", "x" * 2 * CONTEXT, []):
        status, answer = served.run(served.stand.post("/get_score", {"chat": chat}))
        assert status == 400
        if chat:
            assert answer["error"]["code"] == "unsupported_model" and "no reward model" in answer["error"]["message"]


def test_zeros_stay() -> None:
    assert unit(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
