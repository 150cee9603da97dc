"""LightLLM's native API: its shapes to the letter, its defaults, and our errors."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from echo_workers import EOS, logprob
from stand import CONTEXT, SLOTS, Runner, stand

from aiollm.api.native_schema import Parameters
from aiollm.wire.sampling import AllowedIds, Constraint, Decay, FirstIds, Healing, SamplingParams

PATHS = ["/generate", "/generate_stream", "/"]
IM_START = 257


def post(served: Runner, parameters: dict[str, Any], *texts: str, inputs: Any = "say", path: str = "/generate") -> Any:
    async def main() -> Any:
        served.stand.workers.say(*texts)
        status, answer = await served.stand.post(path, {"inputs": inputs, "parameters": {"seed": 0, **parameters}})
        assert status == 200, answer
        return answer

    return served.run(main())


def draw(served: Runner, ids: list[int], parameters: dict[str, Any]) -> Any:
    """The answer where the model draws `ids`."""

    async def main() -> Any:
        served.stand.workers.reply = lambda prompt, seed: ids
        return (await served.stand.post("/generate", {"inputs": "x", "parameters": parameters}))[1]

    return served.run(main())


def stream(served: Runner, parameters: dict[str, Any], text: str, inputs: Any = "say") -> list[Any]:
    """The JSON of each event."""

    async def main() -> bytes:
        served.stand.workers.say(text)
        body = {"inputs": inputs, "parameters": {"seed": 0, **parameters}}
        return await served.stand.events("/generate_stream", body)

    parts = served.run(main()).decode().split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data:{") for part in parts)
    return [json.loads(part.removeprefix("data:")) for part in parts]


def refused(served: Runner, body: Any, path: str = "/generate") -> dict[str, Any]:
    status, answer = served.run(served.stand.post(path, body))
    assert status == 400, answer
    assert list(answer) == ["error"] and sorted(answer["error"]) == ["code", "message", "param", "type"]
    assert served.stand.workers.launched == 0
    error: dict[str, Any] = answer["error"]
    return error


def test_an_answer_has_lightllm_s_shape(served: Runner) -> None:
    assert post(served, {}, "Hello") == {
        "generated_text": ["Hello"],
        "count_output_tokens": 6,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "input_usage": {"input_text_tokens": 3, "input_audio_tokens": 0, "input_image_tokens": 0},
    }


def test_details_tell_of_every_token_and_of_the_end(served: Runner) -> None:
    tokens = post(served, {"return_details": True}, "Hé")["tokens"]
    ids = [*"Hé".encode(), EOS]
    assert tokens == [
        {
            "id": id,
            "text": text,
            "logprob": logprob(id),
            "cumlogprob": sum(map(logprob, ids[: count + 1])) / (count + 1),
            "special": id == EOS,
            "count_output_tokens": count + 1,
            "mtp_accepted_token_num": 0,
        }
        for count, (id, text) in enumerate(zip(ids, ["H", "", "é", ""], strict=True))
    ]


def test_choices_come_as_lists(served: Runner) -> None:
    body = {"best_of": 2, "n": 2, "do_sample": True, "max_new_tokens": 3, "return_details": True}
    answer = post(served, body, "ab", "wxyz")
    assert answer["generated_text"] == ["ab", "wxy"]
    assert answer["count_output_tokens"] == [3, 3]
    assert answer["finish_reason"] == ["stop", "length"]
    assert [[token["text"] for token in tokens] for tokens in answer["tokens"]] == [["a", "b", ""], ["w", "x", "y"]]
    assert answer["prompt_tokens"] == 3


def test_a_stream_has_one_event_a_token_in_lightllm_s_shape(served: Runner) -> None:
    def event(count: int, id: int, text: str, special: bool, reason: str | None) -> dict[str, Any]:
        return {
            "token": {
                "id": id,
                "text": text,
                "logprob": logprob(id),
                "special": special,
                "count_output_tokens": count,
                "prompt_tokens": 3,
            },
            "generated_text": None,
            "finished": reason is not None,
            "finish_reason": reason,
            "details": None,
            "input_usage": {"input_text_tokens": 3, "input_audio_tokens": 0, "input_image_tokens": 0},
        }

    assert stream(served, {}, "Hi") == [
        event(1, ord("H"), "H", False, None),
        event(2, ord("i"), "i", False, None),
        event(3, EOS, "", True, "stop"),
    ]
    assert stream(served, {"max_new_tokens": 1}, "Hi") == [event(1, ord("H"), "H", False, "length")]


@pytest.mark.parametrize("text", ["é🙂z", "a st sto stop", "sstop", "🙂🙂", "no end" * 9])
@pytest.mark.parametrize("stops", [[], ["stop", "🙂z"], ["d"]])
def test_a_stream_gives_what_the_whole_answer_gives(served: Runner, text: str, stops: list[str]) -> None:
    parameters = {"stop_sequences": stops, "return_details": True, "max_new_tokens": 30}
    whole = post(served, parameters, text)
    events = stream(served, parameters, text)
    assert "".join(event["token"]["text"] for event in events) == whole["generated_text"][0]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in whole["tokens"]]
    assert [event["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["finish_reason"] == whole["finish_reason"] and events[-1]["finished"] is True
    assert events[-1]["token"]["count_output_tokens"] == len(events) == whole["count_output_tokens"]


def test_the_root_switches_on_the_stream_field(served: Runner) -> None:
    async def main() -> tuple[Any, bytes]:
        served.stand.workers.say("Hi")
        plain = (await served.stand.post("/", {"inputs": "x"}))[1]
        return plain, await served.stand.events("/", {"inputs": "x"})

    plain, events = served.run(main())
    assert plain["generated_text"] == ["Hi"]
    assert events.count(b"data:{") == 3 and b"[DONE]" not in events


def test_sixteen_new_tokens_are_the_default(served: Runner) -> None:
    answer = post(served, {}, "y" * 100)
    assert (answer["count_output_tokens"], answer["finish_reason"]) == (16, "length")


def test_inputs_may_be_token_ids(served: Runner) -> None:
    answer = post(served, {}, "ok", inputs=[72, 105])
    assert (answer["generated_text"], answer["prompt_tokens"]) == (["ok"], 2)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        ("l", "Hel"),
        (["lo", "xx"], "Hello"),
        ([[108]], "Hel"),
        ([[108, 108]], "Hell"),
        ([[101, 108, 111], [108, 111]], "Hello"),
        (["zzz", [108, 108]], "Hell"),
        ([[101, 108, 111]], "Hello you"),
        ([[EOS]], "Hello you"),
    ],
)
def test_stops_of_every_form_stay_in_the_text(served: Runner, stops: Any, text: str) -> None:
    answer = post(served, {"stop_sequences": stops}, "Hello you")
    assert (answer["generated_text"], answer["finish_reason"]) == ([text], "stop")
    assert answer["count_output_tokens"] == len(text) + (text == "Hello you")


def test_a_stop_group_ends_with_what_a_stop_string_held_back(served: Runner) -> None:
    assert post(served, {"stop_sequences": ["llama", [108, 108]]}, "Hello")["generated_text"] == ["Hell"]


def test_a_stop_group_counts_from_min_new_tokens_on(served: Runner) -> None:
    answer = post(served, {"stop_sequences": [[97, 97]], "min_new_tokens": 5}, "a" * 20)
    assert answer["count_output_tokens"] == 5


def test_min_new_tokens_counts_the_end_of_sequence(served: Runner) -> None:
    assert post(served, {"min_new_tokens": 3}, "ab")["count_output_tokens"] == 3
    assert post(served, {"min_new_tokens": 4}, "ab")["generated_text"] == ["ab~"]
    assert post(served, {}, "")["count_output_tokens"] == 1


def test_the_end_of_sequence_may_be_ignored_or_printed(served: Runner) -> None:
    assert draw(served, [97, EOS, 98], {"ignore_eos": True, "max_new_tokens": 3})["generated_text"] == ["ab"]
    shown = {"skip_special_tokens": False}
    assert draw(served, [97], shown)["generated_text"] == ["a"]
    assert draw(served, [97], shown | {"print_eos_token": True})["generated_text"] == ["a<|im_end|>"]
    assert draw(served, [97], {"print_eos_token": True})["generated_text"] == ["a"]
    assert draw(served, [97, IM_START, 98], shown)["generated_text"] == ["a<|im_start|>b"]


@pytest.mark.parametrize(
    ("parameters", "greedy"),
    [
        ({}, True),
        ({"top_p": 0.5, "top_k": 3}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 0}, True),
        ({"temperature": 1e-6, "do_sample": True}, True),
        ({"do_sample": True}, False),
        ({"do_sample": False, "temperature": 0.7}, True),
    ],
)
def test_only_do_sample_or_a_temperature_asks_for_sampling(parameters: dict[str, Any], greedy: bool) -> None:
    assert Parameters(**parameters).greedy is greedy


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "inputs"),
        ({"inputs": ""}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [259]}, "inputs"),
        ({"inputs": [-1]}, "inputs"),
        ({"inputs": ["a"]}, "inputs"),
        ({"inputs": [65] * CONTEXT}, "inputs"),
        ({"inputs": "x", "parameters": {"max_new_tokens": CONTEXT}}, "inputs"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "multimodal_params": {"images": [{"type": "url", "data": "http://x/y.png"}]}}, "multimodal"),
        ({"inputs": "x", "multimodal_params": [1]}, "multimodal"),
        ({"inputs": "x", "stream": "yes"}, "stream"),
    ],
)
def test_a_bad_body_is_refused_by_the_field_s_name(served: Runner, path: str, body: Any, named: str) -> None:
    error = refused(served, body, path)
    assert named in error["param"] and error["message"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -1}, {"temperature": "1"}, {"top_p": 0}, {"top_k": -2}, {"max_new_tokens": 0},
        {"max_new_tokens": 2**40}, {"min_new_tokens": 0}, {"min_new_tokens": 17},
        {"repetition_penalty": 0}, {"presence_penalty": 3}, {"seed": 2**70}, {"do_sample": "yes"}, {"best_of": 0},
        {"best_of": 2, "n": 3}, {"token_healing": "yes"}, {"first_allowed_tokens": []}, {"first_allowed_tokens": [259]},
        {"allowed_token_ids": [-1]}, {"allowed_token_ids": [259]},
        {"token_healing": True, "first_allowed_tokens": [1]}, {"first_allowed_tokens": [1], "allowed_token_ids": [1]},
        {"token_healing": True, "guided_json": {}}, {"first_allowed_tokens": [1], "bad_words": ["a"]},
        {"return_all_prompt_logprobs": True, "token_healing": True}, {"return_all_prompt_logprobs": 1},
        {"best_of": 129}, {"n": 129}, {"n": 129, "best_of": 129}, {"n": "x"},
        {"stop_sequences": [""]}, {"stop_sequences": [[]]},
        {"stop_sequences": ["x"] * 33}, {"stop_sequences": [[259]]}, {"stop_sequences": [5]}, {"stop_sequences": {}},
        {"stop_sequences": ["x", "x" * 1025]}, {"logit_bias": {"259": 1}}, {"logit_bias": {"1": 101}},
        {"guided_json": {"type": "x"}}, {"guided_grammar": ""}, {"regular_constraint": "["}, {"return_details": 1},
        {"bad_words": [""]},
        {"input_penalty": 1}, {"exponential_decay_length_penalty": [1]}, {"exponential_decay_length_penalty": {}},
        {"exponential_decay_length_penalty": [-1, 1.1]}, {"exponential_decay_length_penalty": [1, 0.9]},
        {"exponential_decay_length_penalty": [1.5, 1.1]}, {"image_max_patch_num": -2}, {"group_request_id": 7},
        {"suggested_dp_index": 1}, {"move_kv_to_decode_node": {"node_id": 1}},
        {"regex": "["}, {"ebnf": ""}, {"grammar": {"type": "regex", "value": "a"}}, {"json_schema": {"type": "x"}},
        {"structured_outputs": {}}, {"structured_outputs": {"structural_tag": "x"}}, {"response_format": {}},
        {"response_format": {"type": "structural_tag"}}, {"token_healing": True, "regex": "a"},
        {"first_allowed_tokens": [1], "response_format": {"type": "json_object"}},
        {"regular_constraint": "a", "regex": "a"}, {"guided_decoding": {"regex": "a"}}, {"lora_path": "x"},
        {"prompt_embeds": "x"}, {"stop_regex": "a"}, {"typical_p": 0.9}, {"watermark": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_parameter_is_refused_by_name(served: Runner, parameters: dict[str, Any]) -> None:
    error = refused(served, {"inputs": "x", "parameters": parameters})
    assert error["param"] in parameters and error["param"] in error["message"]


def test_values_at_the_edge_and_those_that_ask_for_nothing_are_taken(served: Runner) -> None:
    assert post(served, {"stop_sequences": ["x" * 1024] * 32}, "A")["generated_text"] == ["A"]
    nothing = {"watermark": False, "typical_p": 1, "response_format": {"type": "text"}, "first_allowed_tokens": [65]}
    assert post(served, nothing, "A")["generated_text"] == ["A"]


@pytest.mark.parametrize("field", [{"best_of": 2}, {"n": 2}, {"return_all_prompt_logprobs": True}], ids=str)
def test_a_stream_has_one_choice_and_nothing_of_the_prompt(served: Runner, field: dict[str, Any]) -> None:
    assert refused(served, {"inputs": "x", "parameters": field}, "/generate_stream")["param"] == next(iter(field))


def test_of_more_choices_than_are_told_the_likeliest_are(served: Runner) -> None:
    """By the mean logprob of their tokens; here letters are the less likely the later they come."""
    parameters = {"best_of": 4, "n": 2, "do_sample": True, "max_new_tokens": 3}
    answer = post(served, parameters, "xyz", "bcd", "zzz", "bab")
    assert answer["generated_text"] == ["bab", "bcd"]
    assert answer["count_output_tokens"] == [3, 3]
    (one,) = post(served, parameters | {"n": 1}, "xyz", "bcd", "zzz", "bab")["generated_text"]
    assert one == "bab"
    assert post(served, parameters | {"n": 4}, "xyz", "bcd", "zzz", "bab")["generated_text"] == [
        "xyz",
        "bcd",
        "zzz",
        "bab",
    ]


@pytest.mark.parametrize("choices", [1, 3])
def test_every_token_of_a_prompt_is_told_with_what_followed_it(served: Runner, choices: int) -> None:
    parameters = {"return_all_prompt_logprobs": True, "best_of": choices, "do_sample": True}
    answer = post(served, parameters, "ab", inputs="say")
    ids = list(b"say")
    assert answer["prompt_token_ids"] == ids
    assert answer["prompt_logprobs"] == [
        [ids[0], {str(ids[1]): logprob(ids[1])}],
        [ids[1], {str(ids[2]): logprob(ids[2])}],
    ]
    assert answer["generated_text"] == ["ab"] * choices
    assert "prompt_logprobs" not in post(served, {}, "ab")


def drawn_under(
    served: Runner, inputs: Any, parameters: dict[str, Any], output: bytes
) -> tuple[Any, list[int], SamplingParams]:
    """The answer where the model says `output`, the prompt that it was given, and how it was asked to draw."""
    seen: list[tuple[list[int], SamplingParams]] = []

    def reply(prompt: list[int], seed: int) -> list[int]:
        rows = served.stand.workers._rows
        seen.extend((prompt, rows.sampling[row]) for row in rows.active.nonzero()[0].tolist())
        return list(output)

    async def main() -> Any:
        served.stand.workers.reply = reply
        return await served.stand.post("/generate", {"inputs": inputs, "parameters": parameters})

    status, answer = served.run(main())
    assert status == 200, answer
    return answer, *seen[0]


@pytest.mark.parametrize(
    ("inputs", "cut", "output", "text"),
    [
        ("Hello", 2, b"lo world", " world"),
        ("H\xe9", 2, "\xe9l\xe8ne".encode(), "l\xe8ne"),
        ("a", 0, b"b", "b"),
        ("ab", 1, b"b", ""),
        ([*b"abc", IM_START], 0, b"d", "d"),
        ([*b"ab", IM_START, *b"c"], 1, b"cd", "d"),
        ([*b"ab", 0xC3], 2, b"b\xc3\xa9!", "\xe9!"),
        ([*b"a\xf0\x9f", 0x99, 0x82], 2, "\U0001f642!".encode()[2:], "!"),
    ],
    ids=str,
)
def test_a_healed_prompt_is_cut_and_its_end_is_counted_and_not_told_again(
    served: Runner, inputs: Any, cut: int, output: bytes, text: str
) -> None:
    ids = list(inputs.encode()) if isinstance(inputs, str) else inputs
    answer, prompt, sampling = drawn_under(served, inputs, {"token_healing": True, "return_details": True}, output)
    assert prompt == ids[: len(ids) - cut]
    assert sampling.constraints == ((Healing(bytes(ids[len(ids) - cut :])),) if cut else ())
    assert answer["generated_text"] == [text]
    assert "".join(token["text"] for token in answer["tokens"]) == text
    assert answer["count_output_tokens"] == len(output) + 1
    assert answer["prompt_tokens"] == len(ids)


def test_healing_leaves_room_for_all_new_tokens(served: Runner) -> None:
    answer, *_ = drawn_under(served, "Hello", {"token_healing": True, "max_new_tokens": 5}, b"lo" + b"x" * 50)
    assert (answer["generated_text"], answer["finish_reason"]) == (["xxxxx"], "length")
    assert answer["count_output_tokens"] == 5 + 2


@pytest.mark.parametrize(
    ("parameters", "output", "text", "reason"),
    [
        ({"stop_sequences": [[100]]}, b"ld and so on", " and", "stop"),
        ({"stop_sequences": [[100, 32]]}, b"ld and so on", " and ", "stop"),
        ({"stop_sequences": [[108, 100]]}, b"ld and so on", " and so on", "stop"),
        ({"stop_sequences": [[100]], "min_new_tokens": 3}, b"ld dad", " dad", "stop"),
        ({"stop_sequences": [[100]], "max_new_tokens": 2}, b"ld and so on", " a", "length"),
        ({"stop_sequences": [[32]]}, b"ld and so on", " ", "stop"),
    ],
    ids=str,
)
def test_stop_ids_are_looked_for_behind_a_healed_prompt(
    served: Runner, parameters: dict[str, Any], output: bytes, text: str, reason: str
) -> None:
    answer, *_ = drawn_under(served, "hello world", {"token_healing": True, **parameters}, output)
    assert (answer["generated_text"], answer["finish_reason"]) == ([text], reason)


@pytest.mark.parametrize(("inputs", "cut"), [("Hello", 2), ("a", 0)])
def test_the_end_gets_likelier_by_what_comes_behind_a_healed_prompt(served: Runner, inputs: str, cut: int) -> None:
    parameters = {"token_healing": True, "exponential_decay_length_penalty": [5, 1.5]}
    _, _, sampling = drawn_under(served, inputs, parameters, b"lo world")
    assert sampling.decay == Decay(5 + cut, 1.5, (EOS,))


def test_a_healed_stream_gives_what_the_whole_answer_gives(served: Runner) -> None:
    events = stream(served, {"token_healing": True, "stop_sequences": ["o"]}, "lo world", inputs="Hello")
    assert [event["token"]["text"] for event in events] == ["", "", " ", "w", "o"]
    assert [event["token"]["prompt_tokens"] for event in events] == [5] * 5


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ({"first_allowed_tokens": [97, 98]}, FirstIds((97, 98))),
        ({"allowed_token_ids": [97, EOS]}, AllowedIds((97, EOS))),
    ],
    ids=str,
)
def test_allowed_tokens_reach_the_worker(served: Runner, field: dict[str, Any], constraint: Constraint) -> None:
    _, prompt, sampling = drawn_under(served, "xy", field, b"a")
    assert (prompt, sampling.constraints) == (list(b"xy"), (constraint,))


INTERNAL = {
    "group_request_id": -1, "suggested_dp_index": 0, "move_kv_to_decode_node": None, "image_max_patch_num": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "parameters", [None, {}, {"unknown": 1, "temperature": None, "stop_sequences": None, "n": 1}, INTERNAL]
)
def test_nulls_and_unknown_parameters_are_taken(served: Runner, parameters: Any) -> None:
    body = {"inputs": "x", "parameters": parameters, "multimodal_params": {"images": [], "audios": []}, "more": 1}
    assert served.run(served.stand.post("/generate", body))[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_tokens_are_counted(served: Runner, method: str) -> None:
    async def main(body: Any) -> tuple[int, Any]:
        async with served.stand.session.request(method, served.stand.url + "/tokens", json=body) as response:
            return response.status, await response.json()

    assert served.run(main({"text": "né"})) == (200, {"ntokens": 3})
    assert served.run(main({"text": "", "parameters": {"add_special_tokens": False}})) == (200, {"ntokens": 0})
    status, answer = served.run(main({"inputs": "x"}))
    assert status == 400 and answer["error"]["param"] == "text"


def test_the_load_is_what_rows_hold_and_will_hold(served: Runner) -> None:
    names = ["current_load", "logical_max_load", "dynamic_max_load"]

    async def load() -> list[float]:
        async with served.stand.session.get(served.stand.url + "/token_load") as response:
            answer = await response.json()
            assert list(answer) == names
            return list(answer.values())

    async def main() -> tuple[list[float], list[float]]:
        served.stand.workers.say("x" * 400)
        before = await load()
        served.stand.workers.held = True
        body = {"inputs": "y" * 24, "parameters": {"max_new_tokens": 401}}
        task = asyncio.create_task(served.stand.post("/generate", body))
        core = served.stand.engine.core
        await served.stand.until(lambda: core is not None and bool(core.ledger.running))
        during = await load()
        served.stand.workers.release()
        assert (await task)[0] == 200
        return before, during

    before, during = served.run(main())
    assert before == [0.0] * 3
    assert 0 < during[0] < (24 + 400) / SLOTS <= during[1] == during[2] < 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_small_questions_are_answered(served: Runner, method: str) -> None:
    async def main(path: str) -> tuple[int, Any]:
        async with served.stand.session.request(method, served.stand.url + path) as response:
            return response.status, await response.json()

    assert served.run(main("/get_model_name")) == (200, {"model_name": "tiny"})
    assert served.run(main("/liveness"))[0] == served.run(main("/readiness"))[0] == 200


def test_a_server_that_loads_says_so(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            for path, status in [("/healthz", 200), ("/liveness", 200), ("/readiness", 503), ("/token_load", 503)]:
                async with served.session.get(served.url + path) as response:
                    assert response.status == status, path
            got, answer = await served.post("/generate", {"inputs": "x"})
            assert got == 503 and answer["error"]["code"] == "loading"

    asyncio.run(main())


def test_an_error_within_a_stream_is_its_last_event(folder: Path) -> None:
    async def main() -> bytes:
        async with stand(folder) as served:
            served.workers.say("x" * 100)
            served.workers.held = True
            task = asyncio.create_task(served.events("/generate_stream", {"inputs": "x"}))
            core = served.engine.core
            await served.until(lambda: core is not None and bool(core.ledger.running))
            served.engine.on_stopped("the model fell over")
            events = await task
            served.workers.release()
            return events

    last = asyncio.run(main()).decode().removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the model fell over"
