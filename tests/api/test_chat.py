import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from stand import CREATED, Runner, stand
from tiny_tokenizer import IM_END, write_byte_tokenizer

from aiollm.api.schema import decode_chat

PATH = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}


def payloads(events: bytes) -> list[Any]:
    """The JSON of each event; the stream must end with [DONE]."""
    parts = events.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-2])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def content(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def post(served: Runner, body: dict[str, Any], *texts: str) -> Any:
    async def main() -> Any:
        if texts:
            served.stand.workers.say(*texts)
        status, answer = await served.stand.post(PATH, body)
        assert status == 200, answer
        return answer

    return served.run(main())


def stream(served: Runner, body: dict[str, Any], *texts: str) -> bytes:
    async def main() -> bytes:
        if texts:
            served.stand.workers.say(*texts)
        return await served.stand.events(PATH, body)

    return served.run(main())


def test_an_answer_has_openai_s_shape(served: Runner) -> None:
    answer = post(served, {**HI, "cache_salt": "shape"}, "Hello")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert answer.pop("created") > CREATED
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 21,
            "completion_tokens": 6,
            "total_tokens": 27,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_stream_has_exactly_the_bytes_that_clients_expect(served: Runner) -> None:
    events = stream(served, {**HI, "cache_salt": "golden", "stream_options": {"include_usage": True}}, "Hey")
    head = re.match(rb'data: (\{"id":"chatcmpl-[0-9a-f]{32}","object":"chat.completion.chunk","created":\d+)', events)
    assert head is not None
    choices = [
        b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{"content":"e"},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{"content":"y"},"logprobs":null,"finish_reason":null}',
        b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}',
    ]
    usage = (
        b'"usage":{"prompt_tokens":21,"total_tokens":25,"completion_tokens":4,'
        b'"prompt_tokens_details":{"cached_tokens":0}}'
    )
    expected = [head[1] + b',"model":"tiny","choices":[' + choice + b"]}" for choice in choices]
    expected.append(head[1] + b',"model":"tiny","choices":[],' + usage + b"}")
    assert events == b"".join(b"data: " + event + b"\n\n" for event in expected) + b"data: [DONE]\n\n"


def test_usage_comes_only_when_asked_for_and_then_last(served: Runner) -> None:
    assert not any("usage" in chunk for chunk in payloads(stream(served, HI, "a")))
    chunks = payloads(stream(served, {**HI, "stream_options": {"include_usage": True}}, "a"))
    assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"] == []


def test_continuous_usage_counts_up(served: Runner) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = payloads(stream(served, {**HI, "stream_options": options}, "abc"))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {21}


def test_n_choices_open_in_order_and_end_once_each(served: Runner) -> None:
    texts = ["first", "2nd", "the third one", ""]
    chunks = payloads(stream(served, {**HI, "n": 4}, *texts))
    opening = [chunk["choices"][0] for chunk in chunks[:4]]
    assert [(choice["index"], choice["delta"]) for choice in opening] == [
        (index, {"role": "assistant", "content": ""}) for index in range(4)
    ]
    assert [content(chunks, index) for index in range(4)] == texts
    ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3] and ends[0] == 3


def test_n_choices_come_in_order_without_a_stream(served: Runner) -> None:
    answer = post(served, {**HI, "n": 3}, "one", "two", "three")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "two", "three"]
    assert answer["usage"]["prompt_tokens"] == 21 and answer["usage"]["completion_tokens"] == 4 + 4 + 6


def test_seeds_of_choices_stay_in_64_bits(served: Runner) -> None:
    seen = []
    served.stand.workers.reply = lambda prompt, seed: seen.append(seed) or [ord("x")]

    async def main() -> None:
        served.stand.workers.reply = lambda prompt, seed: seen.append(seed) or [ord("x")]
        await served.stand.post(PATH, {**HI, "n": 2, "seed": 2**63 - 1})

    served.run(main())
    assert set(seen) == {2**63 - 1, -(2**63)}


def test_a_cached_prefix_is_reported(served: Runner) -> None:
    post(served, {**HI, "cache_salt": "cached"}, "a")
    usage = post(served, {**HI, "cache_salt": "cached"}, "a")["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 20}
    other = post(served, {**HI, "cache_salt": "another"}, "a")["usage"]
    assert other["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("abcdef", "cd", "ab", "cd"),
        ("abcdef", ["xyz", "ef"], "abcd", "ef"),
        ("abcab", "abd", "abcab", None),
        ("STOP", "STOP", "", "STOP"),
        ("你好吗", "好", "你", "好"),
        ("a🙂b", "🙂", "a", "🙂"),
    ],
)
def test_stop_strings_cut_the_text(
    served: Runner, streams: bool, text: str, stop: Any, expected: str, reason: str | None
) -> None:
    body = {**HI, "stop": stop}
    if streams:
        chunks = payloads(stream(served, body, text))
        assert content(chunks) == expected
        last = chunks[-1]["choices"][0]
    else:
        last = post(served, body, text)["choices"][0]
        assert last["message"]["content"] == expected
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", reason)


def test_no_part_of_a_stop_string_is_ever_streamed(served: Runner) -> None:
    chunks = payloads(stream(served, {**HI, "stop": "</end>"}, "ok </en </end>"))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[1:]]
    assert "".join(deltas) == "ok </en "
    assert "</en " in deltas  # held back until it could not be a stop string any more


def test_a_stop_string_may_belong_to_the_output(served: Runner) -> None:
    answer = post(served, {**HI, "stop": "cd", "include_stop_str_in_output": True}, "abcdef")
    assert answer["choices"][0]["message"]["content"] == "abcd"


def test_a_stop_at_the_last_token_wins_over_the_length(served: Runner) -> None:
    choice = post(served, {**HI, "stop": "cd", "max_tokens": 4}, "abcdef")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_ends_the_output_and_is_named(served: Runner, include: bool, text: str) -> None:
    body = {**HI, "stop_token_ids": [ord("c")], "include_stop_str_in_output": include}
    answer = post(served, body, "abcdef")
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["stop_reason"] == ord("c")
    assert answer["usage"]["completion_tokens"] == 3


def test_an_end_of_sequence_that_is_asked_for_is_named_where_it_would_be_ignored(served: Runner) -> None:
    for ignored, reason in ((True, IM_END), (False, None)):
        body = {**HI, "stop_token_ids": [IM_END], "ignore_eos": ignored, "skip_special_tokens": False}
        choice = post(served, body, "ab")["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", reason)
        whole = post(served, {**body, "include_stop_str_in_output": True}, "ab")["choices"][0]["message"]["content"]
        assert whole == ("ab<|im_end|>" if ignored else "ab")


def test_stop_strings_wait_for_min_tokens(served: Runner) -> None:
    choice = post(served, {**HI, "stop": "a", "min_tokens": 3}, "aaaba")["choices"][0]
    assert choice["message"]["content"] == "aaab"


def test_max_tokens_end_with_length(served: Runner) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = post(served, {**HI, name: 3}, "abcdef")
        assert answer["choices"][0]["message"]["content"] == "abc"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 3


def test_a_character_of_several_tokens_is_never_cut(served: Runner) -> None:
    chunks = payloads(stream(served, HI, "a🙂é"))
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]]
    assert deltas == ["a", "🙂", "é"]


def test_text_that_ends_within_a_character_shows_it_as_broken(served: Runner) -> None:
    assert content(payloads(stream(served, {**HI, "max_tokens": 3}, "a🙂"))) == "a\ufffd"
    assert post(served, {**HI, "max_tokens": 3}, "a🙂")["choices"][0]["message"]["content"] == "a\ufffd"


def token(id: int, top: int = 0) -> dict[str, Any]:
    names = [bytes([id + i]).decode("utf-8", "replace") for i in range(top)]
    return {
        "token": bytes([id]).decode("utf-8", "replace"),
        "logprob": -id / 64,
        "bytes": [id],
        "top_logprobs": [{"token": name, "logprob": -(id + i) / 64, "bytes": [id + i]} for i, name in enumerate(names)],
    }


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_go_with_the_text_they_belong_to(served: Runner, streams: bool) -> None:
    body = {**HI, "logprobs": True, "top_logprobs": 2, "stop": "c"}
    if streams:
        chunks = payloads(stream(served, body, "a£bcd"))
        choices = [chunk["choices"][0] for chunk in chunks]
        entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert all(bool(choice["logprobs"]) == bool(choice["delta"].get("content")) for choice in choices)
    else:
        entries = post(served, body, "a£bcd")["choices"][0]["logprobs"]["content"]
    assert entries == [token(byte, 2) for byte in "a£b".encode()]


def test_logprobs_without_alternatives(served: Runner) -> None:
    answer = post(served, {**HI, "logprobs": True}, "ab")
    assert answer["choices"][0]["logprobs"] == {"content": [token(97), token(98)]}


def test_token_ids_may_stand_for_tokens(served: Runner) -> None:
    body = {**HI, "logprobs": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = post(served, body, "ab")
    told = [f"token_id:{drawn}" for drawn in (97, 98, 258)]
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == told
    assert answer["choices"][0]["token_ids"] == [97, 98, 258]
    assert len(answer["prompt_token_ids"]) == 21
    chunks = payloads(stream(served, body, "ab"))
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    parts = [chunk["choices"][0] for chunk in chunks[1:]]
    assert [drawn for part in parts for drawn in part["token_ids"]] == [97, 98, 258]
    assert [entry["token"] for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == told


def test_eos_may_be_ignored(served: Runner) -> None:
    answer = post(served, {**HI, "ignore_eos": True, "max_tokens": 5}, "ab")
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert answer["usage"]["completion_tokens"] == 5
    shown = post(served, {**HI, "ignore_eos": True, "max_tokens": 3, "skip_special_tokens": False}, "ab")
    assert shown["choices"][0]["message"]["content"] == "ab<|im_end|>"


def test_the_last_message_may_be_continued(served: Runner) -> None:
    async def main() -> None:
        messages = [*HI["messages"], {"role": "assistant", "content": "I am"}]
        prompts = []
        served.stand.workers.reply = lambda prompt, seed: prompts.append(prompt) or [ord("!")]
        status, _ = await served.stand.post(PATH, {"messages": messages, "continue_final_message": True})
        assert status == 200
        assert bytes(token_id for token_id in prompts[0] if token_id < 256).endswith(b"assistant\nI am")

    served.run(main())


def test_content_may_come_in_text_parts(served: Runner) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = post(served, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}, "x")
    assert answer["usage"]["prompt_tokens"] == 22


def test_a_refusal_in_the_history_is_text_like_any_other(served: Runner) -> None:
    def tokens(*parts: Any) -> Any:
        messages = [{"role": "assistant", "content": parts}, {"role": "user", "content": "hi"}]
        return post(served, {"messages": messages, "max_tokens": 1}, "x")["usage"]["prompt_tokens"]

    text = {"type": "text", "text": "a"}
    assert tokens(text, {"type": "refusal", "refusal": "no"}) == tokens(text, {"type": "text", "text": "no"})


def test_text_under_another_name_or_bare_is_text_like_any_other(served: Runner) -> None:
    def prompt(*parts: Any) -> Any:
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "return_token_ids": True}
        return post(served, body, "x")["prompt_token_ids"]

    wanted = prompt({"type": "text", "text": "a"}, {"type": "text", "text": "é"})
    assert wanted == prompt({"type": "input_text", "text": "a"}, {"type": "output_text", "text": "é"})
    assert wanted == prompt("a", "é") == prompt("a", {"type": "text", "text": "é"})


def test_the_makers_limit_of_an_answer_holds_where_the_request_has_none(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, generation_config={"max_new_tokens": 3}) as served:
            served.workers.say("abcdef")
            for fields, length in ((HI, 3), ({**HI, "max_tokens": 5}, 5)):
                _, answer = await served.post(PATH, fields)
                assert answer["usage"]["completion_tokens"] == length

    asyncio.run(main())


def test_any_served_name_may_be_asked_for(served: Runner) -> None:
    assert post(served, {**HI, "model": "org/tiny"}, "x")["model"] == "org/tiny"
    assert post(served, {**HI, "model": None}, "x")["model"] == "tiny"


def test_sampling_defaults_are_the_model_s_unless_the_request_says_otherwise(folder: Path) -> None:
    async def main() -> None:
        config = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}
        async with stand(folder, generation_config=config) as served:
            seen = []
            submit = served.engine.submit

            def watched(*requests: Any) -> None:
                seen.extend(request.sampling for request in requests)
                submit(*requests)

            served.engine.submit = watched  # type: ignore[method-assign]
            await served.post(PATH, HI)
            await served.post(PATH, {**HI, "temperature": 0, "top_k": None, "repetition_penalty": 1})
            assert (seen[0].temperature, seen[0].top_k, seen[0].top_p, seen[0].repetition_penalty) == (0.6, 20, 1, 1.1)
            assert (seen[1].temperature, seen[1].top_k, seen[1].repetition_penalty) == (0, 20, 1)

    asyncio.run(main())


def test_the_openai_client_chats_and_streams(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.say("Hello 🙂")
        async with openai.AsyncOpenAI(base_url=served.stand.url + "/v1", api_key="none") as client:
            messages: Any = HI["messages"]
            whole = await client.chat.completions.create(model="tiny", messages=messages, seed=0)
            assert whole.choices[0].message.content == "Hello 🙂" and whole.usage is not None
            chunks = await client.chat.completions.create(model="tiny", messages=messages, seed=0, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            assert text == "Hello 🙂"
            options: Any = {"include_usage": True}
            async with client.chat.completions.stream(
                model="tiny", messages=messages, seed=0, n=2, logprobs=True, stream_options=options
            ) as events:
                final = await events.get_final_completion()
            assert [choice.message.content for choice in final.choices] == ["Hello 🙂"] * 2
            assert final.choices[0].message.role == "assistant"
            assert final.usage is not None and final.usage.completion_tokens == 2 * 11

    served.run(main())


def test_the_openai_client_sees_errors_as_such(served: Runner) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=served.stand.url + "/v1", api_key="none") as client:
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="other", messages=HI["messages"])
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(model="tiny", messages=HI["messages"], temperature=3)
            assert refused.value.param == "temperature"

    served.run(main())


def test_a_body_decodes_to_defaults() -> None:
    request = decode_chat(b'{"messages":[{"role":"user","content":"x"}],"temperature":null,"unknown":{"a":[1]}}')
    assert request.temperature is None and not request.streams and request.stops == []


def test_a_model_without_a_template_completes_and_says_why_it_cannot_chat(tmp_path: Path) -> None:
    runner = Runner(write_byte_tokenizer(tmp_path, chat_template=None))

    async def main() -> None:
        status, answer = await runner.stand.post(PATH, HI)
        assert status == 400 and "no chat template: use /v1/completions" in answer["error"]["message"]
        status, answer = await runner.stand.post("/v1/completions", {"prompt": "hi", "max_tokens": 2})
        assert status == 200 and answer["choices"][0]["text"] == "hi"

    try:
        runner.run(main())
    finally:
        runner.close()


def test_a_template_without_an_end_costs_its_own_request_only(tmp_path: Path) -> None:
    long = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    write_byte_tokenizer(tmp_path, "{% if messages[0].content == 'loop' %}" + long + "{% endif %}hi")
    runner = Runner(tmp_path, render_timeout=0.2)

    async def main() -> None:
        endless = {"messages": [{"role": "user", "content": "loop"}]}
        slow = asyncio.create_task(runner.stand.post(PATH, endless))
        status, _ = await runner.stand.post(PATH, HI)
        assert status == 200 and not slow.done()  # the event loop is free meanwhile
        status, answer = await slow
        assert status == 400 and "was not done with them after 0.2 s" in answer["error"]["message"]

    try:
        runner.run(main())
    finally:
        runner.close()


def test_a_prompt_may_be_scored_without_an_answer(served: Runner) -> None:
    answer = post(served, {**HI, "prompt_logprobs": 0, "max_tokens": 0, "logprobs": True}, "a")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 0
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_prompt_logprobs_stand_beside_the_choices(served: Runner) -> None:
    answer = post(served, {**HI, "prompt_logprobs": 1, "n": 2, "return_tokens_as_token_ids": True}, "a", "b")
    scores = answer["prompt_logprobs"]
    assert len(scores) == answer["usage"]["prompt_tokens"] == 21 and scores[0] is None
    assert scores[-1] == {"10": {"logprob": -10 / 64, "rank": 1, "decoded_token": "\n"}}
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b"]


def test_a_chat_is_cut_to_what_the_request_says(served: Runner) -> None:
    answer = post(served, {**HI, "truncate_prompt_tokens": 5, "return_token_ids": True}, "a")
    assert bytes(answer["prompt_token_ids"]) == b"tant\n"
    answer = post(
        served, {**HI, "truncate_prompt_tokens": 4, "truncation_side": "right", "return_token_ids": True}, "a"
    )
    assert answer["prompt_token_ids"] == [257, *b"use"]


@pytest.mark.parametrize("name", ["request_id", "rid"])
def test_an_id_in_the_body_names_the_request(served: Runner, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")

    async def main(**headers: str) -> tuple[str, str]:
        async with served.stand.session.post(
            served.stand.url + PATH, json={**HI, name: "mine-1.2", "max_tokens": 1}, headers=headers
        ) as response:
            return (await response.json())["id"], response.headers["X-Request-Id"]

    assert served.run(main()) == ("chatcmpl-mine-1.2", "mine-1.2")
    assert served.run(main(**{"X-Request-Id": "header"})) == ("chatcmpl-mine-1.2", "header")
    line = json.loads(caplog.messages[0])
    assert (line["path"], line["status"], line["id"]) == (PATH, 200, "mine-1.2")


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"request_id": "mine", "model": "other"}, 404, True),
        ({"rid": "mine", "temperature": 9}, 400, True),
        ({"request_id": "mine", "messages": "x" * 300_000}, 400, True),
        ({"request_id": "mine", "rid": "other"}, 400, True),
        ({"request_id": 5, "rid": "mine"}, 400, True),
        ({"request_id": "not mine"}, 400, False),
        ({"rid": ["mine"]}, 400, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_bears_the_id_of_the_body_too(
    served: Runner, fields: dict[str, Any], status: int, named: bool
) -> None:
    async def main(path: str, **headers: str) -> str:
        body = {**HI, "prompt": "x", **fields}
        async with served.stand.session.post(served.stand.url + path, json=body, headers=headers) as response:
            assert response.status == status
            return response.headers["X-Request-Id"]

    assert (served.run(main(PATH)) == "mine") == named
    assert served.run(main(PATH, **{"X-Request-Id": "header"})) == "header"
    if "messages" not in fields:
        assert (served.run(main("/v1/completions")) == "mine") == named


def test_a_body_that_is_no_json_has_no_id(served: Runner) -> None:
    async def main() -> str:
        async with served.stand.session.post(served.stand.url + PATH, data=b'{"rid": "mine"') as response:
            assert response.status in (400, 415)
            return response.headers["X-Request-Id"]

    assert served.run(main()) != "mine"


def test_fields_without_effect_are_told_of_in_the_log(served: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")
    beams = {"length_penalty": 1.2, "early_stopping": True}
    post(
        served, {**HI, **beams, "user": "me", "store": False, "metadata": {"a": [1]}, "service_tier": None, "x": 1}, "a"
    )
    post(served, HI, "a")
    first, second = map(json.loads, caplog.messages)
    assert (
        first["ignored"] == ["early_stopping", "length_penalty", "metadata", "store", "user"]
        and "ignored" not in second
    )


def test_documents_and_template_variables_reach_a_template_that_reads_them(tmp_path: Path) -> None:
    template = (
        "{% for document in documents or [] %}[{{ document.title }}]{% endfor %}"
        "{% if role_setting is defined %}{{ role_setting.user_name }}:{% endif %}"
        "{% for each in character_settings or [] %}({{ each.role_name }}){% endfor %}"
        "{% if thinking is defined and thinking %}think{% endif %}{{ messages[0].content }}"
    )
    runner = Runner(write_byte_tokenizer(tmp_path, chat_template=template))

    def asked(**fields: Any) -> str:
        body = {**HI, **fields, "return_token_ids": True}
        return bytes(post(runner, body, "a")["prompt_token_ids"]).decode()

    try:
        assert asked() == "hi"
        assert asked(documents=[{"title": "one", "text": "x"}, {"title": "two"}]) == "[one][two]hi"
        roles = {"role_settings": {"user_name": "Al"}, "character_settings": [{"role_name": "a"}, {"role_name": "b"}]}
        assert asked(**roles) == "Al:(a)(b)hi"
        assert asked(chat_template_kwargs={"thinking": True, "other": 1}) == "thinkhi"
    finally:
        runner.close()


def test_a_developer_is_the_system_where_the_template_knows_none(served: Runner) -> None:
    body = {**HI, "messages": [{"role": "developer", "content": "be"}, *HI["messages"]], "return_token_ids": True}
    assert bytes(token for token in post(served, body, "a")["prompt_token_ids"] if token < 256).startswith(
        b"system\nbe"
    )
