"""Prompts as long as the context, behind which nothing is generated: a real server answers as transformers does."""

import json
import re
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Server
from tiny_model import equivalent, in_fp32, write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

CONTEXT = 64
FLAGS = ("--data_type", "fp32", "--threads", "1", "--chunked_prefill_size", "16", "--max_req_total_len", str(CONTEXT))
FULL = [(7 * at + 3) % 250 for at in range(CONTEXT)]
NEIGHBOUR = {
    "prompt": [72, 105], "max_tokens": CONTEXT - 2, "ignore_eos": True, "temperature": 0, "return_token_ids": True,
    "repetition_penalty": 1.3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "cohere2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(path, request.param, vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS, "--max_total_token_num", "3000") as server:
        yield server


def refused(server: Server, path: str, body: dict[str, Any]) -> str:
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        server.post(path, body)
    message: str = json.load(caught.value)["error"]["message"]
    return message


def test_a_full_prompt_is_embedded_and_scored_beside_rows_that_decode(folder: Path, server: Server) -> None:
    model = in_fp32(equivalent(folder))
    with torch.no_grad():
        hidden = model.model(torch.tensor([FULL])).last_hidden_state[0]
        logprobs = torch.log_softmax(model(torch.tensor([FULL])).logits[0].float(), -1)
    last = hidden[-1].numpy()
    expected = pytest.approx(last / np.linalg.norm(last), abs=1e-4)
    likely = pytest.approx([float(logprobs[at, FULL[at + 1]]) for at in range(CONTEXT - 1)], abs=1e-3)
    alone = server.post("/v1/completions", NEIGHBOUR)["choices"][0]["token_ids"]
    assert len(alone) == CONTEXT - 2
    scored = {"prompt": FULL, "max_tokens": 0}
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            streams = [pool.submit(server.post, "/v1/completions", NEIGHBOUR) for _ in range(3)]
            vectors = pool.submit(server.post, "/v1/embeddings", {"input": [FULL, FULL[1:], FULL]})
            echoed = pool.submit(server.post, "/v1/completions", {**scored, "echo": True, "logprobs": 0})
            told = pool.submit(server.post, "/v1/completions", {**scored, "prompt_logprobs": 0})
            first, _, third = (found["embedding"] for found in vectors.result()["data"])
            assert first == expected and third == expected
            (choice,) = echoed.result()["choices"]
            assert choice["logprobs"]["token_logprobs"][0] is None and choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"][1:] == likely
            (choice,) = told.result()["choices"]
            assert [next(iter(each.values()))["logprob"] for each in choice["prompt_logprobs"][1:]] == likely
            assert [stream.result()["choices"][0]["token_ids"] for stream in streams] == [alone] * 3
    cut = {"input": [*FULL, 5], "truncate_prompt_tokens": CONTEXT, "truncation_side": "right"}
    assert server.post("/v1/embeddings", cut)["data"][0]["embedding"] == expected


def test_one_token_more_is_refused(server: Server) -> None:
    most = f"maximum context length is {CONTEXT} tokens"
    for path, body in [
        ("/v1/embeddings", {"input": [*FULL, 5]}),
        ("/v1/completions", {"prompt": [*FULL, 5], "max_tokens": 0, "echo": True}),
        ("/v1/completions", {"prompt": FULL, "max_tokens": 1, "echo": True}),
    ]:
        message = refused(server, path, body)
        assert most in message and f"requested {CONTEXT + 1} tokens" in message
    message = refused(server, "/v1/embeddings", {"input": FULL, "truncate_prompt_tokens": CONTEXT + 1})
    assert f"{CONTEXT + 1} is more than the {CONTEXT} tokens" in message


def test_where_the_cache_is_smaller_than_the_context_the_largest_prompt_is_told(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS, "--max_total_token_num", "24") as server:
        message = refused(server, "/v1/embeddings", {"input": FULL})
        found = re.search(r"maximum context length is (\d+) tokens. However, you requested 64 tokens", message)
        assert found is not None
        most = int(found[1])
        assert most < CONTEXT
        assert len(server.post("/v1/embeddings", {"input": FULL[:most]})["data"]) == 1
        refused(server, "/v1/embeddings", {"input": FULL[: most + 1]})
        assert len(server.post("/v1/embeddings", {"input": FULL, "truncate_prompt_tokens": -1})["data"]) == 1
        message = refused(server, "/v1/embeddings", {"input": FULL, "truncate_prompt_tokens": most + 1})
        assert f"{most + 1} is more than the {most} tokens" in message
