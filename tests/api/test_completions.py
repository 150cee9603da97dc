import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from stand import CONTEXT, CREATED, Runner, stand

PATH = "/v1/completions"


def post(served: Runner, body: dict[str, Any], *texts: str) -> Any:
    async def main() -> Any:
        if texts:
            served.stand.workers.say(*texts)
        status, answer = await served.stand.post(PATH, {"seed": 0, **body})
        assert status == 200, answer
        return answer

    return served.run(main())


def stream(served: Runner, body: dict[str, Any], *texts: str) -> list[Any]:
    """The JSON of each event."""

    async def main() -> bytes:
        if texts:
            served.stand.workers.say(*texts)
        return await served.stand.events(PATH, {"seed": 0, **body})

    parts = served.run(main()).decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def text(chunks: list[Any], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def test_an_answer_has_openai_s_shape(served: Runner) -> None:
    answer = post(served, {"prompt": "say", "cache_salt": "shape"}, "Hello")
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer.pop("id"))
    assert answer.pop("created") > CREATED
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None},
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_last_chunk_of_a_stream_carries_the_reason(served: Runner) -> None:
    chunks = stream(served, {"prompt": "say", "max_tokens": 2, "stream_options": {"include_usage": True}}, "Hello")
    assert [chunk["object"] for chunk in chunks] == ["text_completion"] * 3
    assert chunks[0]["choices"] == [
        {"index": 0, "text": "H", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert chunks[1]["choices"] == [
        {"index": 0, "text": "e", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert chunks[2]["choices"] == [] and chunks[2]["usage"]["completion_tokens"] == 2


def test_sixteen_tokens_are_the_default(served: Runner) -> None:
    assert post(served, {"prompt": "x"}, "y" * 100)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cde"], ["ab", "cde"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_every_form_of_prompt_is_taken(served: Runner, prompt: Any, texts: list[str], streams: bool) -> None:
    if streams:
        chunks = stream(served, {"prompt": prompt})
        assert [text(chunks, index) for index in range(len(texts))] == texts
    else:
        answer = post(served, {"prompt": prompt})
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_choices_are_numbered_prompt_by_prompt(served: Runner) -> None:
    async def main() -> Any:
        served.stand.workers.reply = lambda prompt, seed: [*prompt, ord("0") + seed]
        return (await served.stand.post(PATH, {"prompt": ["a", "b"], "n": 2, "seed": 0}))[1]

    answer = served.run(main())
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a0"), (1, "a1"), (2, "b0"), (3, "b1"),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 2


def entry(data: str) -> list[float]:
    return [-byte / 64 for byte in data.encode()]


def test_logprobs_have_the_legacy_shape(served: Runner) -> None:
    logprobs = post(served, {"prompt": "x", "logprobs": 1}, "ab")["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": entry("ab"),
        "top_logprobs": [{"a": -97 / 64}, {"b": -98 / 64}],
        "text_offset": [0, 1],
    }


def test_zero_logprobs_tell_of_the_drawn_token_only(served: Runner) -> None:
    logprobs = post(served, {"prompt": "x", "logprobs": 0}, "a")["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -97 / 64}]


def test_offsets_count_characters_not_bytes(served: Runner) -> None:
    logprobs = post(served, {"prompt": "x", "logprobs": 0}, "é🙂z")["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("streams", [False, True])
def test_echo_puts_the_prompt_first(served: Runner, streams: bool) -> None:
    body = {"prompt": "pre 🙂 ", "echo": True}
    if streams:
        assert text(stream(served, body, "fix")) == "pre 🙂 fix"
    else:
        answer = post(served, body, "fix")
        assert answer["choices"][0]["text"] == "pre 🙂 fix"
        assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("skips", [True, False])
def test_offsets_count_the_special_tokens_of_a_prompt_that_is_echoed_as_it_came(served: Runner, skips: bool) -> None:
    prompt = "é<|im_start|>x<|im_end|>"
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "skip_special_tokens": skips, "max_tokens": 1}
    choice = post(served, body, "y")["choices"][0]
    assert choice["text"] == prompt + "y"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 13, 14, 24]


def test_echo_decodes_a_prompt_of_ids(served: Runner) -> None:
    assert post(served, {"prompt": [97, 98], "echo": True}, "c")["choices"][0]["text"] == "abc"


def test_a_character_that_the_prompt_begins_and_the_output_ends_is_echoed_whole(served: Runner) -> None:
    start, rest = list("a🙂".encode())[:3], list("🙂".encode())[2:]

    async def main() -> Any:
        served.stand.workers.reply = lambda prompt, seed: rest
        return (await served.stand.post(PATH, {"prompt": start, "echo": True}))[1]

    assert served.run(main())["choices"][0]["text"] == "a🙂"
    scored = post(served, {"prompt": start, "echo": True, "max_tokens": 0})
    assert scored["choices"][0]["text"] == "a\ufffd"


@pytest.mark.parametrize("streams", [False, True])
def test_echo_with_logprobs_scores_the_prompt(served: Runner, streams: bool) -> None:
    prompt = "é" + "b" * 150  # more than one chunk
    body = {"prompt": prompt, "echo": True, "logprobs": 2}
    if streams:
        parts = [chunk["choices"][0]["logprobs"] for chunk in stream(served, body, "yz")]
        logprobs = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    else:
        logprobs = post(served, body, "yz")["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["\ufffd", "\ufffd", *"b" * 150, "y", "z", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [None, *entry(prompt + "yz")[1:], -258 / 64]
    assert logprobs["text_offset"] == [0, 0, *range(1, 154)]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][2] == {"b": -98 / 64, "c": -99 / 64}
    assert logprobs["top_logprobs"][-2] == {"z": -122 / 64, "{": -123 / 64}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("prompt", ["a", "scored"])
def test_a_prompt_may_be_scored_without_generating(served: Runner, prompt: str, streams: bool) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    if streams:
        body["stream_options"] = {"include_usage": True}
        *chunks, usage = stream(served, body, "never shown")
        assert text(chunks) == prompt
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert usage["usage"]["completion_tokens"] == 0
    else:
        answer = post(served, body, "never shown")
        assert answer["choices"][0]["text"] == prompt
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, *entry(prompt)[1:]]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0


def test_stop_strings_are_not_sought_in_the_echo(served: Runner) -> None:
    choice = post(served, {"prompt": "a stop", "echo": True, "stop": "stop", "logprobs": 0}, "b stop c")["choices"][0]
    assert choice["text"] == "a stopb "
    assert choice["logprobs"]["tokens"] == list("a stopb ")
    assert choice["stop_reason"] == "stop"


def test_token_ids_may_be_asked_for(served: Runner) -> None:
    body = {"prompt": "xy", "return_token_ids": True}
    choice = post(served, body, "ab")["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([120, 121], [97, 98, 258])
    scored = post(served, {**body, "echo": True, "max_tokens": 0}, "ab")["choices"][0]
    assert (scored["prompt_token_ids"], scored["token_ids"]) == ([120, 121], [])
    chunks = stream(served, body, "ab")
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[120, 121], None, None]
    assert [drawn for chunk in chunks for drawn in chunk["choices"][0]["token_ids"]] == [97, 98, 258]


def test_token_ids_and_logprobs_are_told_of_the_same_tokens(served: Runner) -> None:
    body = {"prompt": "xy", "return_token_ids": True, "logprobs": 1}
    choice = post(served, body, "ab")["choices"][0]
    assert choice["token_ids"] == [97, 98, 258] and choice["text"] == "ab"
    logprobs = choice["logprobs"]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [3] * 4
    chunks = [chunk["choices"][0] for chunk in stream(served, body, "ab")]
    assert [drawn for chunk in chunks for drawn in chunk["token_ids"]] == [97, 98, 258]
    told = [logprob for chunk in chunks for logprob in chunk["logprobs"]["token_logprobs"]]
    assert told == logprobs["token_logprobs"]
    alone = post(served, {"prompt": "xy", "logprobs": 1}, "ab")["choices"][0]["logprobs"]
    assert alone["tokens"] == ["a", "b"], "without ids, what is told is the text's"


def test_the_openai_client_completes(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.say("Hello 🙂")
        async with openai.AsyncOpenAI(base_url=served.stand.url + "/v1", api_key="none") as client:
            whole = await client.completions.create(model="tiny", prompt="x", seed=0, logprobs=1)
            assert whole.choices[0].text == "Hello 🙂"
            assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.text_offset is not None
            chunks = await client.completions.create(model="tiny", prompt=[[120], [121]], seed=0, stream=True)
            texts = {0: "", 1: ""}
            async for chunk in chunks:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == {0: "Hello 🙂", 1: "Hello 🙂"}

    served.run(main())


def test_a_server_may_cut_prompts_that_are_too_long(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, long_truncation_mode="head") as served:
            for path, body in (
                ("/v1/completions", {"prompt": "x" * 2000, "max_tokens": 5}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 5}),
            ):
                status, answer = await served.post(path, body)
                assert status == 200
                assert answer["usage"]["prompt_tokens"] == CONTEXT - 5
                assert answer["usage"]["completion_tokens"] == 5

    asyncio.run(main())


def scored(token_id: int, rank: int) -> dict[str, Any]:
    return {"logprob": -token_id / 64, "rank": rank, "decoded_token": bytes([token_id]).decode("utf-8", "replace")}


def test_prompt_logprobs_have_vllm_s_shape(served: Runner) -> None:
    for cached in (False, True):  # what the cache has of the prompt is computed again: its logprobs are not kept
        answer = post(served, {"prompt": ["xyz", "é"], "prompt_logprobs": 2, "n": 2, "cache_salt": "scores"}, "a")
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, cached
        for choice in answer["choices"][:2]:
            assert choice["text"] == "a" and choice["logprobs"] is None
            assert choice["prompt_logprobs"] == [
                None,
                {"121": scored(121, 1), "122": scored(122, 2)},
                {"122": scored(122, 1), "123": scored(123, 2)},
            ]
        for choice in answer["choices"][2:]:
            assert choice["prompt_logprobs"] == [None, {"169": scored(169, 1), "170": scored(170, 2)}]


def test_a_prompt_may_be_scored_without_an_answer(served: Runner) -> None:
    answer = post(served, {"prompt": "xy", "prompt_logprobs": 1, "max_completion_tokens": 0, "n": 2}, "a")
    assert answer["usage"]["completion_tokens"] == 0
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        assert choice["prompt_logprobs"] == [None, {"121": scored(121, 1)}]


def test_a_prompt_token_has_its_rank_without_alternatives_too(served: Runner) -> None:
    choice = post(served, {"prompt": "xy", "prompt_logprobs": 0}, "a")["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"121": scored(121, 122)}]
    assert "prompt_logprobs" not in post(served, {"prompt": "xy"}, "a")["choices"][0]


def test_prompt_logprobs_go_with_an_echo(served: Runner) -> None:
    body = {"prompt": "xy", "prompt_logprobs": 1, "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = post(served, body, "a")["choices"][0]
    assert choice["text"] == "xy" and choice["logprobs"]["token_logprobs"] == [None, *entry("y")]
    assert choice["prompt_logprobs"] == [None, {"121": scored(121, 1)}]


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "fgh"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "fgh"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 8}, "abcdefgh"),
        ({"truncate_prompt_tokens": 9, "truncation_side": "right"}, "abcdefgh"),
        ({"truncate_prompt_tokens": -1}, "abcdefgh"),
        ({"truncation_side": "right"}, "abcdefgh"),
    ],
)
def test_a_prompt_is_cut_to_what_the_request_says(served: Runner, asked: dict[str, Any], kept: str) -> None:
    body = {**asked, "prompt": "abcdefgh", "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = post(served, body)
    assert answer["choices"][0]["text"] == kept and answer["choices"][0]["logprobs"]["tokens"] == list(kept)
    assert answer["usage"]["prompt_tokens"] == len(kept)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({}, ["a", "b"]),
        ({"do_sample": True}, ["a", "b"]),
        ({"do_sample": False}, ["a", "a"]),
        ({"do_sample": False, "temperature": 0.5}, ["a", "b"]),
        ({"do_sample": True, "temperature": 0}, ["a", "a"]),
    ],
)
def test_do_sample_says_whether_to_draw_where_no_temperature_does(
    served: Runner, fields: dict[str, Any], texts: list[str]
) -> None:
    answer = post(served, {"prompt": "x", "n": 2, **fields}, "a", "b")
    assert [choice["text"] for choice in answer["choices"]] == texts


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens"])
def test_an_answer_s_length_is_limited_under_every_name(served: Runner, name: str) -> None:
    answer = post(served, {"prompt": "x", name: 3, "top_logprobs": None}, "abcdefgh")
    assert answer["choices"][0]["text"] == "abc" and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["min_tokens", "min_new_tokens"])
def test_an_answer_has_its_fewest_tokens_under_either_name(served: Runner, name: str) -> None:
    assert post(served, {"prompt": "x", name: 3, "stop": ["a", "d"]}, "abcdefgh")["choices"][0]["text"] == "abc"


@pytest.mark.parametrize(("least", "expected"), [(1, "a"), (2, "a"), (3, "abcd")])
def test_a_stop_string_may_begin_before_min_tokens_and_end_behind(served: Runner, least: int, expected: str) -> None:
    body = {"prompt": "x", "min_tokens": least, "stop": ["bc"]}
    choice = post(served, body, "abcd")["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (expected, "bc" if expected == "a" else None)
    assert text(stream(served, body, "abcd")) == expected


def test_a_prompt_that_is_too_long_may_be_cut_to_what_fits(served: Runner) -> None:
    answer = post(served, {"prompt": "x" * 2000 + "end", "truncate_prompt_tokens": -1, "max_tokens": 12}, "y" * 50)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (CONTEXT - 12, 12)
    ids = [65] * 1000
    answer = post(served, {"prompt": [ids, [66]], "truncate_prompt_tokens": 100, "max_tokens": 1}, "y")
    assert answer["usage"]["prompt_tokens"] == 101


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_a_stop_string_may_be_kept_under_either_name(served: Runner, name: str) -> None:
    assert post(served, {"prompt": "x", "stop": "cd", name: True}, "abcde")["choices"][0]["text"] == "abcd"
    assert post(served, {"prompt": "x", "stop": "cd", name: False}, "abcde")["choices"][0]["text"] == "ab"


def test_lm_eval_scores_continuations(served: Runner) -> None:
    """Its requests and its reading of the answers, for prompts as ids and as text. The one token that it asks for and
    throws away may be the end of sequence."""
    pairs = [("The sky is", " blue"), ("Ä🙂", "ö你!"), ("x", "y" * 300)]
    contexts = [len(context.encode()) for context, _ in pairs]
    texts = [context + continuation for context, continuation in pairs]
    for prompts in ([list(text.encode()) for text in texts], texts):
        for first in ([258], [66]):

            async def main(prompts: Any = prompts, first: Any = first) -> Any:
                served.stand.workers.reply = lambda prompt, seed: first
                body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1}
                status, answer = await served.stand.post(PATH, {**body, "seed": 1234, "echo": True})
                assert status == 200, answer
                return answer

            choices = sorted(served.run(main())["choices"], key=lambda choice: int(choice["index"]))
            assert len(choices) == 3
            for choice, text, begin in zip(choices, texts, contexts, strict=True):
                logprobs = choice["logprobs"]
                tokens, tops = logprobs["token_logprobs"][begin:-1], logprobs["top_logprobs"][begin:-1]
                expected = entry(text)[begin:]
                assert tokens == expected and sum(tokens) == sum(expected)
                assert all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))
                assert choice["text"] == text + ("" if first == [258] else "B")
                starts = [at for at, character in enumerate(text) for _ in character.encode()]
                assert logprobs["text_offset"] == [*starts, len(text)]
