"""Structured output as its users meet it: a real server and worker over a tiny random model, which obeys nobody."""

import json
import os
import re
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import conformance
import jsonschema
import openai
import pydantic
import pytest
import tokenizers
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import IM_END, VOCAB_SIZE, byte_alphabet, write_byte_tokenizer

from aiollm.grammar.llguidance import matcher_of, tokenizer_of
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "8000", "--running_max_req_size", "8")
PAIRS = "([a-m][n-z]){%d}"
# What ends a string, an array or an object comes sooner than by chance.
HASTE = {str(ord(mark)): 4 for mark in '"}],'} | {str(IM_END): 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE + 21, max_position_embeddings=2048)
    return write_byte_tokenizer(made)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(
        "--model_dir", str(folder), *FLAGS, "--reasoning_parser", "deepseek_r1", "--model_name", "tiny"
    ) as running:
        yield running


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    """The choice of one completion."""
    body = {"prompt": "x", "max_tokens": 600, "temperature": 1.0, "seed": 3, "return_token_ids": True, **fields}
    (choice,) = server.post("/v1/completions", body)["choices"]
    found: dict[str, Any] = choice
    return found


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[a-c]{2,9}"}, "[a-c]{2,9}"),
        ({"guided_regex": "a/b\\d+!"}, "a/b\\d+!"),
        ({"structured_outputs": {"regex": "\\w{3}"}}, "\\w{3}"),
        ({"guided_choice": ["a b", "c\nd", "é.*"]}, "a b|c\nd|é\\.\\*"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"ebnf": 'root ::= "<" [0-9] ("," [0-9])* ">"'}, "<\\d(,\\d)*>"),
        ({"grammar": 'root ::= "a" [0-9] "c"'}, "a\\dc"),
        ({"guided_grammar": 'start: "<" N ">"\nN: /[0-9]{1,5}/'}, "<\\d{1,5}>"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "bc"'}}, "a|bc"),
        ({"guided_json": {"type": "integer"}}, "-?\\d+"),
        ({"regular_constraint": "[a-c]{2,9}"}, "[a-c]{2,9}"),
        ({"json_schema": '{"enum": [1, 22]}'}, "1|22"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "null"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "q"}}}}, '"q"'),
        ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, "7"),
        ({"response_format": {"type": "json_schema", "schema": {"const": 7}}}, "7"),
        ({"response_format": {"schema": '{"const": 7}'}}, "7"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_answer_follows_what_is_asked_for_under_every_name(
    server: Server, fields: dict[str, Any], pattern: str
) -> None:
    for seed in range(3):
        choice = complete(server, seed=seed, logit_bias=HASTE, **fields)
        assert choice["finish_reason"] == "stop", choice
        assert re.fullmatch(pattern, choice["text"]), choice["text"]


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_a_json_object_without_a_schema(server: Server, fields: dict[str, Any]) -> None:
    choice = complete(server, logit_bias=HASTE, **fields)
    assert choice["finish_reason"] == "stop" and isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("parameters", "pattern"),
    [
        ({"regular_constraint": "[xy]{4}"}, "[xy]{4}"),
        ({"guided_json": {"enum": [10, 20]}}, "10|20"),
        ({"guided_choice": ["x.", "yy"]}, "x\\.|yy"),
        ({"guided_regex": "[xy]{4}"}, "[xy]{4}"),
        ({"guided_grammar": 'root ::= "a" "b"+ "c"'}, "ab+c"),
        ({"regex": "[xy]{4}"}, "[xy]{4}"),
        ({"ebnf": 'root ::= "a" "b"+ "c"'}, "ab+c"),
        ({"grammar": 'root ::= "a" "b"+ "c"'}, "ab+c"),
        ({"json_schema": {"enum": [10, 20]}}, "10|20"),
        ({"structured_outputs": {"regex": "[xy]{4}"}}, "[xy]{4}"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [10, 20]}}}}, "10|20"),
    ],
    ids=str,
)
def test_an_answer_follows_the_native_names(server: Server, parameters: dict[str, Any], pattern: str) -> None:
    asked = {"max_new_tokens": 300, "do_sample": True, "seed": 1, **parameters}
    answer = server.post("/generate", {"inputs": "x", "parameters": asked})
    (text,) = answer["generated_text"]
    assert answer["finish_reason"] == "stop" and re.fullmatch(pattern, text), text


class Mood(Enum):
    CALM, LOUD = "calm", "loud"


class Verdict(pydantic.BaseModel):
    """Whatever a random model chooses, it ends by itself."""

    model_config = pydantic.ConfigDict(extra="forbid")

    mood: Mood
    sure: bool
    marks: tuple[Literal[1, 2, 3], Literal["x", "y"]]
    why: Literal['é "quoted"', "\n"] | None


def test_the_openai_client_parses_answers_into_the_class_that_asked_for_them(server: Server) -> None:
    asked: Any = {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 600, "temperature": 1.0, "model": "tiny",
        "logit_bias": {str(ord(space)): -100 for space in " \t\r\n"}, "seed": 0,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }  # fmt: skip
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.parse(**asked, response_format=Verdict)
        message = chat.choices[0].message
        assert message.parsed is not None and message.parsed == Verdict.model_validate_json(message.content or "")
        with client.chat.completions.stream(**asked, response_format=Verdict) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == message.parsed
        schema: Any = {"name": "v", "strict": True, "schema": Verdict.model_json_schema()}
        plain = client.chat.completions.create(
            **asked, n=2, response_format={"type": "json_schema", "json_schema": schema}
        )
        assert all(Verdict.model_validate_json(choice.message.content or "") for choice in plain.choices)


@pytest.mark.parametrize("thoughts", [0, 30])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 22]}}}}, "1|22"),
        ({"guided_grammar": 'start: "}" "{" /[{}]/ X // }\nX: "}"', "logit_bias": {str(IM_END): 5}}, r"}{[{}]}"),
        ({"ebnf": 'root ::= "<" [0-9]+ ">"', "logit_bias": {str(ord(">")): 5}}, "<\\d+>"),
        ({}, "(?s:.*)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_model_thinks_within_its_budget_and_then_answers_by_its_grammar(
    server: Server, fields: dict[str, Any], pattern: str, thoughts: int
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 1.0, "seed": 3}
    body |= {"thinking_token_budget": thoughts, "return_token_ids": True, **fields}
    (choice,) = server.post("/v1/chat/completions", body)["choices"]
    assert bytes(choice["token_ids"][thoughts : thoughts + 8]) == b"</think>"
    assert ("reasoning" in choice["message"]) == (thoughts > 0)
    assert re.fullmatch(pattern, choice["message"]["content"]), choice
    assert choice["finish_reason"] == "stop" or not fields


def test_allowed_ids_and_banned_words_hold_for_every_token(server: Server) -> None:
    free = complete(server, max_tokens=300, ignore_eos=True)
    allowed = complete(server, max_tokens=300, ignore_eos=True, allowed_token_ids=[65, 66, 67])
    assert set(allowed["token_ids"]) == {65, 66, 67} and allowed["finish_reason"] == "length"
    banned = complete(
        server, max_tokens=300, ignore_eos=True, allowed_token_ids=[65, 66, 67], bad_words=["A", "BBB", "CC"]
    )
    assert not {"A", "BBB", "CC"} & {banned["text"][i : i + n] for i in range(300) for n in (1, 2, 3)}
    assert {"BB", "BC", "CB"} <= {banned["text"][i : i + 2] for i in range(299)}, "and nothing else is"
    assert len(set(free["token_ids"])) > 50


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [65, 66], "bad_words": ["AA", "AB", "BA", "BB"]},
        {"allowed_token_ids": [65, IM_END], "bad_words": ["AA"], "min_tokens": 3},
        {"regex": "[AB]+", "bad_words": ["A", "B"]},
    ],
    ids=str,
)
def test_constraints_that_leave_no_token_are_the_request_s_own_fault(server: Server, fields: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400") as refusal:
        complete(server, **fields)
    with refusal.value as answer:
        error = json.load(answer)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "unsatisfiable_constraints")
    assert "allow no token" in error["message"]


def test_an_answer_stops_when_its_grammar_ends_though_min_tokens_asks_for_more(server: Server) -> None:
    choice = complete(server, regex="a{1,3}", min_tokens=200)
    assert (choice["text"], choice["finish_reason"]) == ("aaa", "stop")


def test_a_stop_string_ends_constrained_text_as_it_does_any_other(server: Server) -> None:
    schema = {"type": "array", "items": {"enum": ["a}b", "c"]}, "minItems": 1}
    asked = {"guided_json": schema, "logit_bias": HASTE}
    inside = complete(server, **asked, stop="}")
    assert (inside["finish_reason"], inside["stop_reason"]) == ("stop", "}") and inside["text"].endswith('"a')
    last = complete(server, **asked, stop="]", include_stop_str_in_output=True)
    assert last["stop_reason"] == "]" and jsonschema.validate(json.loads(last["text"]), schema) is None
    never = complete(server, **asked, stop="d")
    assert (never["finish_reason"], never["stop_reason"]) == ("stop", None) and json.loads(never["text"])


def test_an_answer_that_reaches_max_tokens_is_cut(server: Server) -> None:
    choice = complete(server, regex=PAIRS % 50, max_tokens=11)
    assert choice["finish_reason"] == "length" and re.fullmatch("([a-m][n-z]){5}[a-m]", choice["text"])


def test_choices_of_one_request_differ_and_all_follow(server: Server) -> None:
    body = {"prompt": "x", "n": 4, "max_tokens": 100, "temperature": 1.0, "seed": 5, "regex": PAIRS % 6}
    texts = [choice["text"] for choice in server.post("/v1/completions", body)["choices"]]
    assert all(re.fullmatch(PAIRS % 6, text) for text in texts) and len(set(texts)) == 4


def test_constrained_and_free_rows_in_one_batch_draw_what_they_draw_alone(server: Server) -> None:
    """Prompts in chunks, more requests than rows, and rows that are used again beside one another."""

    def ask(at: int) -> list[int]:
        constrained = {"regex": PAIRS % (20 + at)} if at % 2 else {"ignore_eos": True, "max_tokens": 60 + at}
        ids: list[int] = complete(server, prompt="y" * (1 + 40 * at), seed=at, **constrained)["token_ids"]
        return ids

    alone = [ask(at) for at in range(20)]
    with ThreadPoolExecutor(20) as pool:
        crowded = list(pool.map(ask, range(20)))
    assert crowded == alone
    assert all(re.fullmatch(PAIRS % (20 + at), bytes(alone[at][:-1]).decode()) for at in range(1, 20, 2))


def test_requests_that_are_paused_go_on_by_their_grammar(folder: Path, server: Server) -> None:
    """A pool with room for two: the others are paused, and their matchers built again."""
    alone = [complete(server, regex=PAIRS % 80, max_tokens=170, seed=seed)["token_ids"] for seed in range(6)]
    small = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "400", "--running_max_req_size", "6")
    with (
        Server("--model_dir", str(folder), *small, "--schedule_policy", "aggressive") as tight,
        ThreadPoolExecutor(6) as pool,
    ):
        crowded = list(
            pool.map(lambda seed: complete(tight, regex=PAIRS % 80, max_tokens=170, seed=seed)["token_ids"], range(6))
        )
        assert tight.metric("aiollm_num_preemptions_total") > 0
    assert crowded == alone


def test_ranks_draw_what_the_first_of_them_may(folder: Path) -> None:
    flags = ("--model_dir", str(folder), *FLAGS, "--device", "cpu", "--tp", "2")
    with Server(*flags) as ranks, ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda seed: complete(ranks, regex=PAIRS % 30, seed=seed)["text"], range(4)))
    assert all(re.fullmatch(PAIRS % 30, text) for text in texts) and len(set(texts)) == 4


def test_a_killed_worker_costs_no_constrained_token(server: Server) -> None:
    alone = complete(server, regex=PAIRS % 150, seed=9)["token_ids"]
    (victim,) = server.workers()
    found: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: found.append(complete(server, regex=PAIRS % 150, seed=9)["token_ids"]), daemon=True
    )
    before = server.metric("aiollm_generation_tokens_total")
    thread.start()
    deadline = time.monotonic() + 30
    while server.metric("aiollm_generation_tokens_total") < before + 20:
        assert time.monotonic() < deadline, "no tokens came"
    os.kill(victim, signal.SIGKILL)
    thread.join(60)
    assert found == [alone]


def texts(instance: Any) -> list[str]:
    """An instance as models write it."""
    return [json.dumps(instance, ensure_ascii=False, separators=by) for by in [(",", ":"), (", ", ": ")]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that has learnt the instances, so that its tokens reach over quotes, colons, digits and braces."""
    bytewise = write_byte_tokenizer(tmp_path_factory.mktemp("words"))
    learner = tokenizers.Tokenizer.from_file(str(bytewise / "tokenizer.json"))
    instances = [text for case in conformance.schemas() for instance in case["valid"] for text in texts(instance)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=byte_alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    learner.train_from_iterator(instances, trainer)
    learner.save(str(bytewise / "tokenizer.json"))
    return bytewise


@pytest.mark.parametrize("made", ["folder", "words"])
def test_every_valid_instance_is_accepted_token_by_token(made: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.load(str(request.getfixturevalue(made)))
    assert tokenizer.vocabulary is not None
    (end,) = tokenizer.vocabulary.eos
    tokens = tokenizer_of(tokenizer.vocabulary, tokenizer.vocab_size)
    longest = 0
    for case in conformance.schemas():
        matcher = matcher_of(Grammar("json", json.dumps(case["schema"])), tokens)
        for instance in case["valid"]:
            jsonschema.Draft202012Validator(case["schema"]).validate(instance)
            for text in texts(instance):
                follows = matcher.deep_copy()
                for id in tokenizer.encode(text, False):
                    mask = follows.compute_bitmask()
                    assert mask[id // 8] >> id % 8 & 1, (case["schema"], text)
                    assert follows.consume_token(id)
                    longest = max(longest, len(tokenizer.token_bytes(id)))
                mask = follows.compute_bitmask()
                assert mask[end // 8] >> end % 8 & 1, (case["schema"], text)
    assert longest == 1 if made == "folder" else longest > 8


@pytest.mark.long
def test_answers_of_a_random_model_validate(server: Server) -> None:
    cases = conformance.schemas()
    assert len(cases) >= 200
    quiet = {"enable_thinking": False}  # a random model thinks for ever
    verdict = next(conformance.conformance(server, cases, logit_bias=HASTE, chat_template_kwargs=quiet))
    assert verdict.wrong == []
    assert verdict.ended > 0.9 * len(cases)
