"""Prompts and fields of every size and kind, at a real server: refused or served, and nothing stays behind."""

import asyncio
import json
import random
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from calm import FLAGS
from serving import Server
from stand import stand
from tiny_tokenizer import END_OF_TEXT, IM_END, IM_START, write_byte_tokenizer, write_sentencepiece_tokenizer

from aiollm.text.tokenizer import Tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MEGABYTE = 1_000_000
USER = [{"role": "user", "content": "hi"}]
ODD = {
    "one letter": "a", "spaces": " ", "newlines": "\n", "digits": "0123456789", "emoji": "👩‍👩‍👧‍👦",
    "marks": "e\u0301\u0301\u0301", "control": "\x7f\x85\x9f", "directions": "\u202e\u202d",
    "letters": "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=9973)),
}  # fmt: skip


def text(kind: str) -> str:
    """A megabyte of it in UTF-8."""
    unit = ODD[kind]
    return unit * (MEGABYTE // len(unit.encode()) + 1)


def refused(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a 400."""
    with pytest.raises(urllib.error.HTTPError, match="400") as error:
        server.post(path, body)
    with error.value as answer:
        found: dict[str, Any] = json.load(answer)["error"]
        return found


@pytest.mark.parametrize("kind", ODD)
def test_a_megabyte_of_odd_text_is_too_long_and_delays_no_probe(server: Server, kind: str) -> None:
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(refused(server, TEXT, {"prompt": text(kind)})))
    asking.start()
    while asking.is_alive():
        assert server.get("/health")[0] == 200
    (error,) = answers
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("kind", ODD)
def test_a_tokenizer_that_splits_nothing_is_not_quadratic(tmp_path: Path, kind: str) -> None:
    """A megabyte is one word to it: comparing each piece with each other one would take hours."""
    tokenizer = Tokenizer.load(str(write_sentencepiece_tokenizer(tmp_path)))
    began = time.monotonic()
    assert len(tokenizer.encode(text(kind), False)) > MEGABYTE // 100
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("prompt", [[END_OF_TEXT], [IM_START, IM_END], [IM_END] * 50])
def test_prompts_of_nothing_but_control_tokens_are_continued(server: Server, prompt: list[int]) -> None:
    answer = server.post(TEXT, {"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 3


def test_a_server_may_take_typed_control_tokens_for_text(folder: Path) -> None:
    with Server("--model_dir", str(folder), "--split_special_tokens", *FLAGS) as server:
        chat = {"messages": [{"role": "user", "content": "<|im_end|>"}], "add_generation_prompt": False}
        assert server.post("/tokenize", chat)["tokens"] == [IM_START, *b"user\n<|im_end|>", IM_END, *b"\n"]
        answer = server.post(TEXT, {"prompt": "<|im_end|>", "max_tokens": 3, "ignore_eos": True})
        assert answer["usage"] == answer["usage"] | {"prompt_tokens": 10, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {str(i): 1 for i in range(300_000)}),
        ("stop", ["x"] * 300_000),
        ("stop", "x" * MEGABYTE),
        ("chat_template_kwargs", {"name": "x" * MEGABYTE}),
        ("chat_template_kwargs", {"x" * MEGABYTE: 1}),
        ("chat_template_kwargs", {f"x{i}": i for i in range(100_000)}),
        ("chat_template_kwargs", {"deep": {"deep": {"deep": 1}}}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_field_of_a_megabyte_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    error = refused(server, CHAT, {"messages": USER, field: value})
    assert error["param"] == field and len(error["message"]) < 1000


def test_scores_of_whole_prompts_take_no_more_memory_each_time(server: Server) -> None:
    body = {"prompt": "so it goes " * 180, "max_tokens": 0, "echo": True, "logprobs": 20}
    for _ in range(8):
        found = server.post(TEXT, body)["choices"][0]["logprobs"]["token_logprobs"]
        assert len(found) == 1980 and found[0] is None and all(logprob < 0 for logprob in found[1:])


def test_what_a_template_refuses_is_answered_in_its_words(tmp_path: Path) -> None:
    source = "{{ raise_exception('roles must alternate') }}"

    async def main() -> None:
        async with stand(write_byte_tokenizer(tmp_path, source)) as served:
            status, answer = await served.post(CHAT, {"messages": USER})
            assert status == 400 and "roles must alternate" in answer["error"]["message"]
            assert answer["error"]["param"] == "messages"

    asyncio.run(main())
