"""Calls of functions and reasoning over HTTP: what is streamed is what is not."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_answers import PATH, TEMPLATE, both, constraints, joined
from outputs import FUNCTIONS, NOW, OUTPUTS, PARIS, WILD, Output, hermes
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": name, "parameters": FUNCTIONS[name]}} for name in FUNCTIONS]
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 0, "tools": TOOLS}
ODD: list[dict[str, Any]] = [
    {"type": "banana"}, {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
    {"$ref": "#/nowhere"},
]  # fmt: skip
"""Schemas of parameters that no grammar can follow."""
Serve = Callable[..., Runner]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Stands by their formats, each started once."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("model"), TEMPLATE)
    runners: dict[tuple[str, str], Runner] = {}

    def get(calls: str = "auto", reasoning: str = "auto") -> Runner:
        if (calls, reasoning) not in runners:
            runners[calls, reasoning] = Runner(folder, tool_call_parser=calls, reasoning_parser=reasoning)
        return runners[calls, reasoning]

    yield get
    for runner in runners.values():
        runner.close()


@pytest.fixture
def served(serve: Serve) -> Runner:
    return serve()


def function(name: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"tool_calls": [call | {"id": "?"} for call in message.get("tool_calls", ())]}


@pytest.mark.parametrize("output", [pytest.param(output, id=name) for name, output in OUTPUTS.items()])
def test_every_output_is_answered_alike_streamed_and_whole(serve: Serve, output: Output) -> None:
    served = serve(output.calls, output.style)
    kwargs = {"opening": output.prompt} if output.style != "none" else {}
    body = {**HI, "chat_template_kwargs": kwargs} | ({"tools": None} if output.calls == "none" else {})
    answer, chunks = served.run(both(served, body, output.text))
    choice, streamed = answer["choices"][0], joined(chunks)
    message = choice["message"]
    assert without_ids(streamed["message"]) == without_ids(message)
    assert (
        streamed["finish_reason"]
        == choice["finish_reason"]
        == ("tool_calls" if output.said[2] and output.complete else "stop")
    )
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert (message.get("reasoning", ""), message["content"] or "", calls) == output.said
    assert message.get("reasoning_content", "") == message.get("reasoning", "")


def test_the_formats_come_from_the_template_unless_they_are_named(serve: Serve) -> None:
    for served, expected in ((serve(), 1), (serve("mistral", "none"), 0)):
        answer, _ = served.run(both(served, HI, hermes(*NOW)))
        assert len(answer["choices"][0]["message"].get("tool_calls", ())) == expected


def test_an_answer_with_calls_has_openai_s_shape(served: Runner) -> None:
    answer, chunks = served.run(both(served, HI, f"Well. {hermes('get_weather', PARIS)}"))
    choice = answer["choices"][0]
    id = choice["message"]["tool_calls"][0].pop("id")
    assert id.startswith("call_") and len(id) == 29
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": PARIS}}],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
        "stop_reason": None,
    }
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    begin = next(at for at, delta in enumerate(deltas) if "tool_calls" in delta)
    assert deltas[begin]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    assert deltas[begin + 1 : -1] == [
        {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in PARIS
    ]  # each as soon as it is there
    assert deltas[-1] == {}


def test_ids_of_calls_differ_and_are_short_where_the_template_wants_it(serve: Serve) -> None:
    served = serve("mistral", "none")
    answer, chunks = served.run(both(served, HI, "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}"))
    messages = [answer["choices"][0]["message"], joined(chunks)["message"]]
    ids = [call["id"] for message in messages for call in message["tool_calls"]]
    assert len(set(ids)) == 4 and all(len(id) == 9 and id.isalnum() for id in ids)


def test_choices_each_have_their_calls(served: Runner) -> None:
    texts = [f"<think>a</think>{hermes(*NOW)}", "only text", f"{hermes('get_weather', PARIS)}{hermes(*NOW)}"]
    answer, chunks = served.run(both(served, {**HI, "n": 3, "temperature": 1}, *texts))
    choices = [joined(chunks, index) for index in range(3)]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    for choice, streamed in zip(answer["choices"], choices, strict=True):
        assert without_ids(choice["message"]) == without_ids(streamed["message"])
        assert choice["finish_reason"] == streamed["finish_reason"]
    names = [[call["function"]["name"] for call in one["message"].get("tool_calls", ())] for one in choices]
    assert names == [["now"], [], ["get_weather", "now"]]


def test_logprobs_and_token_ids_come_once_each_whatever_the_text_became(served: Runner) -> None:
    text = f"<think>\nHm\n</think>\nWell.\n{hermes('get_weather', PARIS)}\n"
    body = {**HI, "logprobs": True, "return_token_ids": True}
    answer, chunks = served.run(both(served, body, text))
    choice = answer["choices"][0]
    tokens = [entry["bytes"][0] for entry in choice["logprobs"]["content"][:-1]]
    assert bytes(tokens).decode() == text  # and then the token that ends it
    assert joined(chunks)["logprobs"] == choice["logprobs"]["content"]
    ids = [id for chunk in chunks for part in chunk["choices"] for id in part.get("token_ids", ())]
    assert ids == choice["token_ids"] == [*text.encode(), 258]


def test_usage_counts_the_tokens_of_calls_and_reasoning(served: Runner) -> None:
    text = f"<think>Hm</think>{hermes('get_weather', PARIS)}"

    async def run() -> None:
        served.stand.workers.say(text)
        options = {"include_usage": True, "continuous_usage_stats": True}
        parts = (await served.stand.events(PATH, {**HI, "stream_options": options})).decode().split("\n\n")
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        assert counts == sorted(counts) and counts[-1] == len(text) + 1
        assert chunks[-1]["choices"] == []

    served.run(run())


def test_a_call_that_the_length_cuts_off_ends_with_length(served: Runner) -> None:
    text = hermes("write_file", WILD)
    before = text.index("text")
    answer, chunks = served.run(both(served, {**HI, "max_tokens": before}, text))
    choice, streamed = answer["choices"][0], joined(chunks)
    assert choice["finish_reason"] == streamed["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"path": "\\u00e9.py", "'
    whole = hermes(*NOW)
    answer, _ = served.run(both(served, {**HI, "max_tokens": len(whole)}, whole + "and more"))
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_demanded_call_that_is_cut_off_before_its_arguments_is_no_content(served: Runner, choice: Any) -> None:
    text = f"<think>Hm</think>{hermes('get_weather', PARIS)}"
    for length in (text.index(mark) + 1 for mark in ("<tool_call>", '"name"', "weather", '": {"city"')):
        answer, chunks = served.run(both(served, {**HI, "tool_choice": choice, "max_tokens": length}, text))
        (told,), streamed = answer["choices"], joined(chunks)
        assert told["finish_reason"] == streamed["finish_reason"] == "length"
        assert told["message"] | {"reasoning_content": ""} == {
            "role": "assistant", "content": "", "reasoning": "Hm", "reasoning_content": "",
        }  # fmt: skip
        assert streamed["message"] == told["message"]


def test_stop_strings_cut_what_the_model_wrote(served: Runner) -> None:
    text = f"<think>one two</think>Well {hermes('get_weather', PARIS)} STOP {hermes(*NOW)}"
    answer, chunks = served.run(both(served, {**HI, "stop": ["STOP"]}, text))
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", "STOP")
    assert without_ids(joined(chunks)["message"]) == without_ids(choice["message"])
    assert len(choice["message"]["tool_calls"]) == 1
    answer, _ = served.run(both(served, {**HI, "stop": [" two"]}, text))
    assert answer["choices"][0]["message"] | {"reasoning_content": ""} == {
        "role": "assistant", "content": "", "reasoning": "one", "reasoning_content": "",
    }  # fmt: skip


def test_one_call_is_all_where_calls_are_not_parallel(served: Runner) -> None:
    text = f"{hermes('get_weather', PARIS)}{hermes(*NOW)} Done."
    answer, chunks = served.run(both(served, {**HI, "parallel_tool_calls": False, "n": 2}, text, text))
    for index, choice in enumerate(answer["choices"]):
        message = choice["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
        assert message["content"] is None and (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
        streamed = joined(chunks, index)
        assert without_ids(streamed["message"]) == without_ids(message) and streamed["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("calls", ["hermes", "llama3", "mistral", "deepseek", "glm", "qwen3_coder", "pythonic"])
def test_nothing_is_generated_behind_the_one_call(serve: Serve, calls: str) -> None:
    served = serve(calls, "none")
    found = [output for output in OUTPUTS.values() if output.calls == calls and output.complete]
    text = next(output.text for output in found if len(output.said[2]) == 1)
    fields = [{}, {"logprobs": True, "return_token_ids": True, "stop": ["never"], "n": 2, "temperature": 0}]
    for options in fields if calls == "hermes" else fields[:1]:
        body: dict[str, Any] = {**HI, "parallel_tool_calls": False, **options}
        answer, chunks = served.run(both(served, body, text + " and on" * 50))
        choice, streamed = answer["choices"][0], joined(chunks)
        (call,) = choice["message"]["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert answer["usage"]["completion_tokens"] <= len(text.encode()) * body.get("n", 1)
        assert without_ids(streamed["message"]) == without_ids(choice["message"])
        assert choice["finish_reason"] == streamed["finish_reason"] == "tool_calls"


def test_a_lone_call_does_not_end_before_min_tokens(served: Runner) -> None:
    body = {**HI, "parallel_tool_calls": False, "min_tokens": 120}
    answer, _ = served.run(both(served, body, hermes(*NOW) + " and on" * 50))
    assert answer["usage"]["completion_tokens"] == 120 and "and on" not in json.dumps(answer)


def test_a_stop_string_within_a_call_leaves_no_finished_call(served: Runner) -> None:
    text = f"{hermes(*NOW)}{hermes('get_weather', PARIS)}"
    for stop, reason, arguments in (
        ("Par", "stop", ["{}", '{"city": "']),
        ("</tool_call>", "tool_calls", ["{}"]),
    ):
        answer, chunks = served.run(both(served, {**HI, "stop": [stop]}, text))
        choice, streamed = answer["choices"][0], joined(chunks)
        assert choice["finish_reason"] == streamed["finish_reason"] == reason and choice["stop_reason"] == stop
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == arguments
        assert without_ids(streamed["message"]) == without_ids(choice["message"])
    answer, _ = served.run(both(served, HI, text[:-20]))
    assert answer["choices"][0]["finish_reason"] == "stop", "the model itself ended within the call"


def test_reasoning_may_be_left_out_or_left_in_the_text(served: Runner) -> None:
    text = "<think>Hm</think>\nYes"
    for fields, expected in (
        ({"include_reasoning": False}, {"content": "Yes"}),
        ({"separate_reasoning": False}, {"content": text}),
        ({}, {"content": "Yes", "reasoning": "Hm", "reasoning_content": "Hm"}),
    ):
        answer, chunks = served.run(both(served, HI | fields, text))
        assert answer["choices"][0]["message"] == {"role": "assistant"} | expected
        assert joined(chunks)["message"] == {"role": "assistant"} | expected


def test_with_tool_choice_none_the_model_hears_of_no_tools(served: Runner) -> None:
    prompts = []

    async def run() -> None:
        served.stand.workers.reply = lambda prompt, seed: prompts.append(prompt) or list(hermes(*NOW).encode())
        for choice in ("none", "auto", None):
            status, answer = await served.stand.post(PATH, {**HI, "tool_choice": choice})
            assert status == 200
            assert (answer["choices"][0]["message"].get("tool_calls") is None) == (choice == "none")

    served.run(run())
    assert [b"get_weather" in bytes(id for id in prompt if id < 256) for prompt in prompts[:1] + prompts[-1:]] == [
        False, True,
    ]  # fmt: skip


def test_calls_that_cannot_be_demanded_are_refused(served: Runner) -> None:
    for fields, param in (
        *(({"tools": [function("f", schema)], "tool_choice": "required"}, "tools") for schema in ODD),
        *(({"tools": [function("f", schema, strict=True)]}, "tools") for schema in ODD),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ):
        status, answer = served.run(served.stand.post(PATH, HI | fields))
        assert status == 400 and answer["error"]["param"] == param, answer
        assert not re.search("start:|call_|%json|\n", answer["error"]["message"])


def test_parameters_that_nobody_enforces_are_left_to_the_model(served: Runner) -> None:
    named = {"tool_choice": {"type": "function", "function": {"name": "now"}}}
    for schema in (*ODD, None):
        for fields in ({}, {"tool_choice": "auto"}, named):
            tools = [function("f", schema), function("now", None)]
            status, answer = served.run(served.stand.post(PATH, {**HI, "tools": tools, "max_tokens": 1, **fields}))
            assert status == 200, answer
    for fields in ({"tool_choice": "required"}, {"tools": [function("f", None, strict=True)]}):
        body = {**HI, "tools": [function("f", None)], "max_tokens": 1, **fields}
        status, answer = served.run(served.stand.post(PATH, body))
        assert status == 200, answer


def test_strict_schemas_that_no_call_between_tags_can_follow_are_refused(serve: Serve) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "x"}}}}
    served = serve("glm", "none")
    for strict, expected in ((True, 400), (False, 200)):
        tools = [{"type": "function", "function": {**function, "strict": strict}}]
        status, answer = served.run(served.stand.post(PATH, {**HI, "tools": tools, "max_tokens": 1}))
        assert status == expected, answer
        if strict:
            assert answer["error"]["param"] == "tools" and "pattern" in answer["error"]["message"]


def test_what_is_demanded_reaches_the_worker_as_a_grammar(served: Runner) -> None:
    strict = {"type": "function", "function": {"name": "s", "strict": True}}
    named = {"type": "function", "function": {"name": "now"}}

    async def run() -> None:
        for fields in (
            {}, {"tool_choice": "required"}, {"tool_choice": named}, {"tools": [*TOOLS, strict]},
            {"tools": [*TOOLS, strict], "response_format": {"type": "json_object"}},
        ):  # fmt: skip
            served.stand.workers.say(hermes(*NOW))
            status, answer = await served.stand.post(PATH, {**HI, **fields})
            assert status == 200, answer
            assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"

    with constraints(served) as seen:
        served.run(run())
    free, required, single, guarded, formatted = ([grammar.source for grammar in each] for each in seen)
    assert free == [] and "get_weather" in required[0]
    assert formatted[0].startswith('start: %json {"type": "object"')
    assert "now" in single[0] and "get_weather" not in single[0]
    assert guarded[0].startswith("start: (free call)* TAIL")


def test_a_model_without_a_known_format_of_calls_says_so(serve: Serve) -> None:
    served = serve("none", "none")
    status, answer = served.run(served.stand.post(PATH, HI))
    assert status == 400 and "--tool_call_parser" in answer["error"]["message"]
    status, _ = served.run(served.stand.post(PATH, {**HI, "tool_choice": "none", "max_tokens": 1}))
    assert status == 200


def test_marks_that_are_special_tokens_are_seen_and_others_are_not(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "{{ tools }}<tool_call>{{ messages[0].content }}")
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<tool_call>"))
    runner = Runner(tmp_path)
    call = [257, *b'{"name": "now", "arguments": {}}', 256, *b" so"]  # <tool_call>, and <|endoftext|>

    async def run() -> None:
        runner.stand.workers.reply = lambda prompt, seed: call
        for fields, content in ((HI, "so"), ({**HI, "skip_special_tokens": False}, "<|endoftext|> so")):
            body = {**fields, "tools": TOOLS[1:2]}
            _, answer = await runner.stand.post(PATH, body)
            message = answer["choices"][0]["message"]
            assert message["content"] == content and message["tool_calls"][0]["function"]["name"] == "now"
        _, answer = await runner.stand.post(PATH, {**HI, "tools": None})
        assert answer["choices"][0]["message"]["content"] == '{"name": "now", "arguments": {}} so'

    try:
        runner.run(run())
    finally:
        runner.close()


def test_a_socket_carries_reasoning_and_calls(served: Runner) -> None:
    text = f"<think>Hm</think>Well {hermes('get_weather', PARIS)}"

    async def run() -> None:
        served.stand.workers.say(text)
        async with served.stand.session.ws_connect(served.stand.url + "/v1/chat/ws") as ws:
            await ws.receive_json()
            await ws.send_json({"type": "chat", "id": "a", **HI})
            frames = []
            while not frames or frames[-1]["type"] != "done":
                frames.append(await ws.receive_json())
        deltas = [frame for frame in frames if frame["type"] == "delta"]
        assert "".join(frame["text"] for frame in deltas) == "Well"
        assert "".join(frame.get("reasoning", "") for frame in deltas) == "Hm"
        calls = [call for frame in deltas for call in frame.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls if "id" in call] == ["get_weather"]
        assert "".join(call["function"]["arguments"] for call in calls) == PARIS
        assert frames[-1]["finish_reason"] == "tool_calls"

    served.run(run())


def test_the_openai_package_calls_functions(served: Runner) -> None:
    """The plain client, its stream, its helper `.stream()`, and a second turn with the result."""
    text = f"<think>Hm</think>Let me see. {hermes('get_weather', PARIS)}\n{hermes('write_file', WILD)}"

    def talk() -> None:
        with openai.OpenAI(base_url=served.stand.url + "/v1", api_key="none") as client:
            options: Any = {"model": "tiny", "messages": HI["messages"], "tools": TOOLS, "seed": 0}
            whole = client.chat.completions.create(**options).choices[0]
            assert whole.finish_reason == "tool_calls" and whole.message.content == "Let me see."
            calls = whole.message.tool_calls or []
            assert [(call.function.name, call.function.arguments) for call in calls] == [  # type: ignore[union-attr]
                ("get_weather", PARIS), ("write_file", WILD),
            ]  # fmt: skip
            names, arguments = [], {}
            for chunk in client.chat.completions.create(**options, stream=True):
                for call in chunk.choices[0].delta.tool_calls or ():
                    assert call.function is not None
                    names += [call.function.name] if call.function.name else []
                    arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
            assert names == ["get_weather", "write_file"] and list(arguments.values()) == [PARIS, WILD]
            with client.chat.completions.stream(**options) as stream:
                kinds = {event.type for event in stream}
                final = stream.get_final_completion().choices[0]
            assert "tool_calls.function.arguments.done" in kinds
            assert [call.function.arguments for call in final.message.tool_calls or ()] == [PARIS, WILD]
            assert final.finish_reason == "tool_calls" and final.message.role == "assistant"
            assert getattr(final.message, "reasoning", None) == "Hm"
            served.stand.workers.say("It is sunny.")
            messages = [
                *HI["messages"], whole.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
            ]  # fmt: skip
            answer = client.chat.completions.create(**options | {"messages": messages})
            assert answer.choices[0].message.content == "It is sunny."

    async def run() -> None:
        served.stand.workers.say(text)
        await asyncio.to_thread(talk)

    served.run(run())
