"""Thoughts of a chat: what binds behind them, what limits them, and what of a continued message is one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat_answers import PATH, TEMPLATE, both, constraints, joined
from outputs import FUNCTIONS, NOW, hermes
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer, write_wordpiece_tokenizer

from aiollm.wire.sampling import Grammar, ThoughtLimit

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}
JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}
NOW_TOOL = {"type": "function", "function": {"name": "now", "parameters": FUNCTIONS["now"], "strict": True}}
Serve = Callable[[str], Runner]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Stands by their styles, each started once."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("model"), TEMPLATE)
    runners: dict[str, Runner] = {}

    def get(style: str) -> Runner:
        if style not in runners:
            runners[style] = Runner(folder, reasoning_parser=style)
        return runners[style]

    yield get
    for runner in runners.values():
        runner.close()


def constraints_of(served: Runner, **fields: Any) -> tuple[Any, ...]:
    """What binds the request at the worker."""

    async def run() -> None:
        served.stand.workers.say("")
        status, answer = await served.stand.post(PATH, {**HI, **fields})
        assert status == 200, answer

    with constraints(served) as seen:
        served.run(run())
    (found,) = seen
    return tuple(found)


@pytest.mark.parametrize(
    "asked",
    [
        JSON, {"guided_regex": "a"}, {"structured_outputs": {"choice": ["a"]}}, {"ebnf": 'root ::= "a"'},
        {"tools": [NOW_TOOL], "tool_choice": "required"}, {"tools": [NOW_TOOL]},
    ],
    ids=",".join,
)  # fmt: skip
def test_every_grammar_binds_behind_the_thoughts_that_there_may_be(serve: Serve, asked: dict[str, Any]) -> None:
    for style, kwargs, opened in (
        ("think", {}, False),
        ("think", {"opening": "<think>\n"}, True),
        ("deepseek_r1", {}, True),
        ("think", {"opening": "<think>\n\n</think>\n\n"}, None),
        ("deepseek_r1", {"opening": "</think>"}, None),
        ("think", {"enable_thinking": False}, None),
        ("deepseek_r1", {"thinking": False}, None),
        ("none", {}, None),
    ):
        (grammar,) = constraints_of(serve(style), **asked, chat_template_kwargs=kwargs)
        assert isinstance(grammar, Grammar)
        assert (grammar.thoughts.opened if grammar.thoughts else None) is opened, (style, kwargs)
        if grammar.thoughts:
            assert (grammar.thoughts.open.text, grammar.thoughts.close.ids) == ("<think>", tuple(b"</think>"))


def test_an_answer_by_a_grammar_comes_apart_from_its_thoughts(serve: Serve) -> None:
    thought, answered = "Hm {", '{"a": 1}'
    for kwargs, text, reasoning in (
        ({"opening": "<think>"}, f"{thought}</think>\n{answered}", thought),
        ({}, f"<think>{thought}</think>{answered}", thought),
        ({}, answered, None),
        ({"enable_thinking": False}, answered, None),
    ):
        answer, chunks = serve("think").run(both(serve("think"), {**HI, **JSON, "chat_template_kwargs": kwargs}, text))
        message = answer["choices"][0]["message"]
        assert (message["content"], message.get("reasoning")) == (answered, reasoning)
        assert joined(chunks)["message"] == message


def test_an_answer_that_does_not_think_is_content_whatever_its_style(serve: Serve) -> None:
    body = {**HI, **JSON, "chat_template_kwargs": {"thinking": False}}
    answer, chunks = serve("deepseek_r1").run(both(serve("deepseek_r1"), body, '{"a": 1}'))
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": '{"a": 1}'} == joined(chunks)["message"]


def test_a_budget_of_thoughts_reaches_the_worker_beside_a_grammar_or_alone(serve: Serve) -> None:
    think = serve("think")
    (limit,) = constraints_of(think, thinking_token_budget=7)
    assert isinstance(limit, ThoughtLimit) and limit.tokens == 7 and not limit.thoughts.opened
    grammar, limit = constraints_of(think, thinking_token_budget=0, **JSON)
    assert isinstance(grammar, Grammar) and grammar.thoughts == limit.thoughts and limit.tokens == 0
    for fields in (
        {"thinking_token_budget": -1},
        {"thinking_token_budget": None},
        {"thinking_token_budget": 7, "chat_template_kwargs": {"opening": "<think></think>"}},
    ):
        assert constraints_of(think, **fields) == ()


def test_a_budget_that_nobody_could_keep_is_refused(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = write_wordpiece_tokenizer(tmp_path_factory.mktemp("words"))
    (words / "chat_template.jinja").write_text("words")
    wordpiece = Runner(words, reasoning_parser="think")
    try:
        for served, reason in ((serve("none"), "--reasoning_parser"), (wordpiece, "no text of their own")):
            body = {**HI, "thinking_token_budget": 5}
            status, answer = served.run(served.stand.post(PATH, body))
            assert status == 400 and answer["error"]["param"] == "thinking_token_budget"
            assert reason in answer["error"]["message"]
    finally:
        wordpiece.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": list(b"</think")}, "allowed_token_ids"),
        ({"bad_words": ["think"]}, "bad_words"),
        ({"bad_words": ["no", "</think>"]}, "bad_words"),
        ({"allowed_token_ids": list(b"</think>ok")}, None),
        ({"bad_words": ["thank", "nk>!", "/>"]}, None),
    ],
    ids=str,
)
def test_a_budget_needs_a_closing_tag_that_the_rest_of_the_request_allows(
    serve: Serve, fields: dict[str, Any], param: str | None
) -> None:
    served = serve("think")
    body = {**HI, **fields, "thinking_token_budget": 5, "max_tokens": 1}
    status, answer = served.run(served.stand.post(PATH, body))
    assert status == (400 if param else 200), answer
    assert param is None or (answer["error"]["param"] == param and answer["error"]["message"].startswith(param))
    for free in ({"thinking_token_budget": None}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert served.run(served.stand.post(PATH, {**body, **free}))[0] == 200


@pytest.mark.parametrize("style", ["think", "deepseek_r1"])
def test_a_message_is_continued_in_its_answer_unless_it_is_within_its_thoughts(serve: Serve, style: str) -> None:
    for begun, text, expected in (
        ("Because", " it <i>is</i>", {"content": " it <i>is</i>"}),
        ("<think>a</think>Because", " it is", {"content": " it is"}),
        ("<think>a", "b</think>\nYes", {"content": "Yes", "reasoning": "b", "reasoning_content": "b"}),
        ([{"type": "text", "text": "Because"}], " it is", {"content": " it is"}),
        (["<think>a"], "b</think>\nYes", {"content": "Yes", "reasoning": "b", "reasoning_content": "b"}),
    ):
        messages = [*HI["messages"], {"role": "assistant", "content": begun}]
        body = {**HI, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        answer, chunks = serve(style).run(both(serve(style), body, text))
        assert answer["choices"][0]["message"] == {"role": "assistant", **expected}
        assert joined(chunks)["message"] == answer["choices"][0]["message"]


def test_a_call_that_is_demanded_in_the_middle_of_an_answer_follows_at_once(serve: Serve) -> None:
    messages = [*HI["messages"], {"role": "assistant", "content": "Let me see."}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    body |= {"tools": [NOW_TOOL], "tool_choice": "required"}
    (grammar,) = constraints_of(serve("deepseek_r1"), **body)
    assert grammar.thoughts is None
    answer, _ = serve("deepseek_r1").run(both(serve("deepseek_r1"), {**HI, **body}, hermes(*NOW)))
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
