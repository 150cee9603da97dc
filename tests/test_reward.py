"""Reward models through a real server: scores are those that transformers computes."""

import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tiny_model import expected_score, write_reward_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "500", "--chunked_prefill_size", "16")
TEXT = "The owl and the pussy-cat went to sea"
REWARD = 96  # the tiny InternLM 2's token for it


@pytest.mark.parametrize("flags", [(), ("--tp", "2", "--device", "cpu")], ids=["alone", "tp"])
@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_scores_are_those_of_transformers(family: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    write_reward_model(tmp_path, family, vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(tmp_path)
    end = [REWARD] if family == "internlm2" else []
    ids = [*TEXT.encode(), *end]
    expected = expected_score(tmp_path, ids)
    with Server("--model_dir", str(tmp_path), *FLAGS, *flags) as server:
        for chat in (TEXT, list(TEXT.encode()), ids, TEXT):  # the last one meets its prefix in the cache
            answer = server.post("/get_score", {"chat": chat})
            assert answer == {
                "score": pytest.approx(expected, rel=1e-4), "prompt_tokens": len(ids), "finish_reason": "length",
            }  # fmt: skip
        other = server.post("/get_score", {"chat": TEXT[:-1]})["score"]
        assert other == pytest.approx(expected_score(tmp_path, [*ids[: len(TEXT) - 1], *end]), rel=1e-4)
        for path, field in (("/generate", "inputs"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
            assert "use /get_score" in refusal(server, path, {field: "x"})["message"]
        assert refusal(server, "/get_score", {"chat": []})["param"] == "chat"
        assert refusal(server, "/get_score", {"chat": [VOCAB_SIZE]})["param"] == "chat"
        assert refusal(server, "/get_score", {"chat": "x" * 600})["code"] == "context_length_exceeded"


def refusal(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    assert caught.value.code == 400
    error: dict[str, Any] = json.loads(caught.value.read())["error"]
    return error
