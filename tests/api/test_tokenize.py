"""/tokenize and /detokenize, by both of their names."""

import json
from pathlib import Path
from typing import Any

import pytest
from stand import CONTEXT, Runner
from tiny_tokenizer import IM_END, IM_START, VOCAB_SIZE, write_byte_tokenizer

TOKENIZE, DETOKENIZE = ["/tokenize", "/v1/tokenize"], ["/detokenize", "/v1/detokenize"]
MESSAGES = [{"role": "user", "content": "hé"}]
# As DeepSeek's: content that is none tells calls from an answer. As Llama's: a message with calls has one of them.
CALLING = """{% for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- '<' + call['function']['name'] + '>' + call['function']['arguments'] }}
        {%- endfor %}
    {%- else %}
        {{- '[' + message['content'] + ']' }}
    {%- endif %}
{%- endfor %}"""
CHAT = [IM_START, *"user\nhé".encode(), IM_END, *b"\n", IM_START, *b"assistant\n"]


def ask(served: Runner, path: str, body: Any) -> Any:
    status, answer = served.run(served.stand.post(path, body))
    assert status == 200, answer
    return answer


def refused(served: Runner, path: str, body: Any) -> dict[str, Any]:
    status, answer = served.run(served.stand.post(path, body))
    assert status == 400, answer
    error: dict[str, Any] = answer["error"]
    return error


@pytest.mark.parametrize("path", TOKENIZE)
def test_a_text_becomes_its_ids(served: Runner, path: str) -> None:
    assert ask(served, path, {"prompt": "hé", "model": "tiny"}) == {
        "count": 3, "max_model_len": CONTEXT, "tokens": list("hé".encode()), "token_strs": None,
    }  # fmt: skip
    assert ask(served, path, {"prompt": "", "return_token_strs": True})["token_strs"] == []


def test_several_texts_become_a_list_for_each(served: Runner) -> None:
    answer = ask(served, "/tokenize", {"prompt": ["a", "", "bc"], "return_token_strs": True})
    assert answer["tokens"] == [[97], [], [98, 99]] and answer["count"] == [1, 0, 2]
    assert answer["token_strs"] == [["a"], [], ["b", "c"]]


def test_tokens_are_told_as_the_vocabulary_spells_them(served: Runner) -> None:
    assert ask(served, "/tokenize", {"prompt": "a <|im_end|>", "return_token_strs": True})["token_strs"] == [
        "a", "Ġ", "<|im_end|>",
    ]  # fmt: skip


def test_a_prompt_or_a_chat_is_asked_about(served: Runner) -> None:
    for fields, code, param in (
        ({}, "missing_field", "prompt"),
        ({"messages": None}, "missing_field", "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "invalid_value", "messages"),
    ):
        status, answer = served.run(served.stand.post("/tokenize", fields))
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param)


def test_a_chat_is_what_its_template_makes_of_it(served: Runner) -> None:
    body: dict[str, Any] = {"messages": MESSAGES}
    assert ask(served, "/tokenize", body)["tokens"] == CHAT
    without = ask(served, "/tokenize", body | {"add_generation_prompt": False, "return_token_strs": True})
    assert without["tokens"] == CHAT[:-11] and len(without["token_strs"]) == without["count"] == len(CHAT) - 11
    last = {"role": "assistant", "content": "Sure"}
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ask(served, "/tokenize", {"messages": [*MESSAGES, last]} | options)["tokens"] == [*CHAT, *b"Sure"]
    completion = ask(served, "/v1/chat/completions", body | {"max_tokens": 1})
    assert completion["usage"]["prompt_tokens"] == len(CHAT)


def test_calls_of_earlier_turns_are_told_by_their_missing_content(tmp_path: Path) -> None:
    served = Runner(write_byte_tokenizer(tmp_path, CALLING))
    answer = {"role": "assistant", "content": "yes", "tool_calls": []}

    def text(**fields: Any) -> str:
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", **fields}}]}
        result = {"role": "tool", "tool_call_id": "1", "content": "1"}
        asked: list[Any] = [*MESSAGES, answer, call, result]
        return bytes(ask(served, "/tokenize", {"messages": asked})["tokens"]).decode()

    try:
        for arguments in ('{"a": "é"}', {"a": "é"}):
            assert text(arguments=arguments) == '[hé][yes]<f>{"a": "é"}[1]'
        for fields in ({}, {"arguments": None}, {"arguments": ""}):
            assert text(**fields) == "[hé][yes]<f>{}[1]"
    finally:
        served.close()


def test_special_tokens_that_users_type_are_text_on_demand(tmp_path: Path, served: Runner) -> None:
    source = (
        "{% for message in messages %}<|im_start|>{% for part in message.content %}{{ part.text }}{% endfor %}"
        "<|im_end|>{% endfor %}{% for document in documents or () %}{{ document.text }}<|im_end|>{% endfor %}"
    )
    typed, token = "<|im_end|>", IM_END
    splitting = Runner(write_byte_tokenizer(tmp_path, source), split_special_tokens=True)
    roles = {"user": {}, "assistant": {}, "system": {}, "tool": {"tool_call_id": "1"}}
    texts = [{"type": "text", "text": typed}]
    chat: dict[str, Any] = {
        "messages": [{"role": role, "content": texts, **fields} for role, fields in roles.items()],
        "documents": [{"text": typed}], "return_token_ids": True, "max_tokens": 1,
    }  # fmt: skip
    as_text, as_token = [*typed.encode()], [token]
    try:
        expected = [as_text, as_token, as_token, as_text]
        ids = [id for each in expected for id in (IM_START, *each, IM_END)] + [*as_text, IM_END]
        assert ask(splitting, "/tokenize", chat)["tokens"] == ids
        assert ask(splitting, "/v1/chat/completions", chat)["prompt_token_ids"] == ids
        for runner, expected_ids in ((splitting, as_text), (served, as_token)):
            assert ask(runner, "/tokenize", {"prompt": typed})["tokens"] == expected_ids
            completion = {"prompt": typed, "max_tokens": 1, "return_token_ids": True}
            assert ask(runner, "/v1/completions", completion)["choices"][0]["prompt_token_ids"] == expected_ids
            assert ask(runner, "/tokens", {"text": typed})["ntokens"] == len(expected_ids)
            assert ask(runner, "/v1/embeddings", {"input": typed})["usage"]["prompt_tokens"] == len(expected_ids)
        assert ask(splitting, "/v1/completions", {"prompt": [token], "max_tokens": 1})["usage"]["prompt_tokens"] == 1
    finally:
        splitting.close()


@pytest.mark.parametrize("path", DETOKENIZE)
def test_ids_become_their_text_with_special_tokens(served: Runner, path: str) -> None:
    text = "<|im_start|>hé<|im_end|>"
    ids = ask(served, "/tokenize", {"prompt": text})["tokens"]
    assert ask(served, path, {"tokens": ids}) == {"prompt": text, "text": text}
    assert ask(served, path, {"tokens": ids, "skip_special_tokens": True})["text"] == "hé"
    assert ask(served, path, {"tokens": [ids, [], [97]]})["text"] == [text, "", "a"]
    assert ask(served, path, {"tokens": []})["text"] == ""


def test_long_texts_and_lists_are_read_beside_the_event_loop(served: Runner) -> None:
    text = "ab" * 200_000
    answer = ask(served, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert answer["count"] == len(text) and answer["token_strs"][:2] == ["a", "b"]
    assert ask(served, "/detokenize", json.dumps({"tokens": answer["tokens"]}).encode())["text"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": ["x", 3]}, "prompt"),
        ("/tokenize", {"prompt": [""] * 1025}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": "x"}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [[1], [VOCAB_SIZE]]}, "tokens"),
        ("/detokenize", {"tokens": [[]] * 1025}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_what_is_no_text_and_no_token_is_refused(served: Runner, path: str, body: Any, param: str) -> None:
    assert refused(served, path, body)["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(served: Runner, path: str) -> None:
    status, answer = served.run(served.stand.post(path, {"prompt": "x", "tokens": [1], "model": "other"}))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
