"""Parsers of calls and reasoning: the same events for every cut of the text, and nothing lost."""

import json
import random

import pytest
from outputs import FUNCTIONS, OUTPUTS, Output

from aiollm.text.parsers.formats import FORMATS, STYLES, Speech, speech
from aiollm.text.parsers.source import Arguments, Call, Content, End, Event, Parser, Reasoning

NAMED = [pytest.param(output, id=name) for name, output in OUTPUTS.items()]


def parser(output: Output) -> Parser:
    style = STYLES.get(output.style)
    opened = style.opened_by(output.prompt) if style is not None else None
    return Speech(FORMATS.get(output.calls), style).parser(opened is True, FUNCTIONS)


def events(output: Output, pieces: list[str]) -> list[Event]:
    """The events of all pieces, neighbours of one kind joined."""
    reader = parser(output)
    found: list[Event] = []
    for event in [event for piece in pieces for event in reader.push(piece)] + reader.finish():
        if found and type(event) is type(found[-1]) and isinstance(event, Reasoning | Content | Arguments):
            found[-1] = type(event)(found[-1].text + event.text)  # type: ignore[union-attr]
        else:
            found.append(event)
    return found


def said(found: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    calls: list[tuple[str, str]] = []
    for event in found:
        if isinstance(event, Call):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    texts = ["".join(event.text for event in found if isinstance(event, kind)) for kind in (Reasoning, Content)]
    return texts[0], texts[1], calls


@pytest.mark.parametrize("output", NAMED)
def test_an_output_says_what_it_says(output: Output) -> None:
    found = events(output, [output.text])
    assert said(found) == output.said
    ends = [End() in found[at:] for at, event in enumerate(found) if isinstance(event, Call)]
    assert ends[-1:] in ([], [output.complete]) and all(ends[:-1])
    assert all(piece.text for piece in found if isinstance(piece, Reasoning | Content | Arguments))


@pytest.mark.parametrize("output", NAMED)
def test_every_cut_of_the_text_says_the_same(output: Output) -> None:
    text = output.text
    whole = events(output, [text])
    assert events(output, list(text)) == whole
    for at in range(len(text) + 1):
        assert events(output, [text[:at], text[at:]]) == whole, at
    draw = random.Random(0)
    for _ in range(100):
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(2, 9)))
        assert events(output, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole, cuts


@pytest.mark.parametrize("output", NAMED)
def test_every_beginning_of_an_output_is_the_same_in_one_piece_and_in_many(output: Output) -> None:
    for end in range(len(output.text)):
        assert events(output, list(output.text[:end])) == events(output, [output.text[:end]]), end


@pytest.mark.parametrize("output", NAMED)
def test_what_was_told_is_never_taken_back(output: Output) -> None:
    """Whatever follows: the events of a beginning are a beginning of the events of the whole."""
    reader, whole, told = parser(output), events(output, [output.text]), []
    for piece in output.text:
        told += reader.push(piece)
        text, found = said(told), said(whole)
        assert found[0].startswith(text[0]) and found[1].startswith(text[1])
        assert [name for name, _ in text[2]] == [name for name, _ in found[2]][: len(text[2])]
        assert all(other.startswith(mine) for (_, mine), (_, other) in zip(text[2], found[2], strict=False))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_noise_is_read_without_a_fault_and_complete_arguments_come_as_they_were_written(name: str) -> None:
    """Random pieces of marks and JSON, where nearly nothing is a call."""
    draw = random.Random(name)
    pieces = [*FORMATS[name].marks, *FORMATS["hermes"].marks, "[", "]", "{", "}", '"', "\\", ":", ",", ";", "(", ")",
              "=", '"name"', '"arguments"', '"parameters"', "now", '"now"', "{}", "```", "json", "<", " ", "\n", "é",
              '{"name": "now", "arguments": ', "<think>", "</think>", "[now(", "function"]  # fmt: skip
    for _ in range(400):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 25)))
        output = Output(name, "think", text, ("", "", []))
        whole = events(output, [text])
        assert events(output, list(text)) == whole, text
        if not any(isinstance(event, Call | Reasoning) for event in whole):
            rest = text.strip().removeprefix("<think>").strip().removeprefix("</think>").strip()
            assert said(whole)[1].strip() in (text.strip(), rest), text


def test_arguments_stream_while_they_are_written() -> None:
    output = OUTPUTS["hermes, several"]
    reader = parser(output)
    before = '<tool_call>\n{"name": "write_file", "arguments": {"path": "a", "text": "one '
    assert reader.push(before) == [Call("write_file"), Arguments('{"path": "a", "text": "one ')]
    assert reader.push("two") == [Arguments("two")]
    assert reader.push('"}}') == [Arguments('"}'), End()]
    reader = parser(Output("glm", "none", "", ("", "", [])))
    reader.push("<tool_call>write_file\n<arg_key>text</arg_key>\n<arg_value>")
    assert reader.push('a "b') == [Arguments('a \\"b')]


def test_only_what_may_be_a_mark_is_held_back() -> None:
    reader = parser(OUTPUTS["text"])
    assert [reader.push(piece) for piece in ("a <", "b <tool", "_x", " ", "d")] == [
        [Content("a")], [Content(" <b")], [Content(" <tool_x")], [], [Content(" d")],
    ]  # fmt: skip


@pytest.mark.parametrize("output", NAMED)
def test_complete_arguments_are_json_where_the_model_wrote_json(output: Output) -> None:
    for name, arguments in output.said[2][: None if output.complete else -1]:
        if "nil" not in arguments:
            assert isinstance(json.loads(arguments), dict), name


def test_text_that_is_nearly_calls_is_read_once() -> None:
    """20,000 characters each, which a parser that goes back would read again and again: for minutes."""
    for name, text in [
        ("hermes", "<tool_call>" * 2_000),
        ("hermes", '<tool_call>{"arguments": {"a": "' * 800),
        ("mistral", "[TOOL_CALLS][" * 1_600),
        ("glm", "<tool_call>now<arg_key>" * 1_000),
        ("pythonic", "[now(" + "((" * 10_000),
        ("llama3", '{"parameters": ' + "[" * 20_000),
        ("hermes", "<tool_call" * 2_000),
    ]:
        output = Output(name, "none", text, ("", "", []))
        reader = parser(output)
        shown = [event for piece in text for event in reader.push(piece)] + reader.finish()
        assert "".join(event.text for event in shown if isinstance(event, Content)) or len(shown) > 1


@pytest.mark.parametrize(
    ("template", "calls", "style"),
    [
        ("{{ messages }}", None, None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes", None),
        ("{{ tools }} <tool_call> {{ content.split('</think>') }}", "hermes", "think"),
        ("{{ tools }} <tool_call><function=f>", "qwen3_coder", None),
        ("{{ tools }} <tool_call><arg_key></think>", "glm", "think"),
        ("{{ tools }} [TOOL_CALLS] [THINK][/THINK]", "mistral", "mistral"),
        ("{{ tools }} <｜tool▁calls▁begin｜></think>", "deepseek", "think"),
        ("{{ tools }} [func_name1(params_name1=1)] <|python_tag|>", "pythonic", None),
        ("{{ tools }} <|python_tag|>", "llama3", None),
        (
            '{{ tools }} {"name": function name, "parameters": dictionary of argument name and its value}',
            "llama3",
            None,
        ),
        ("<tool_call> without a list of them", None, None),
    ],
)
def test_formats_follow_from_the_template(template: str, calls: str | None, style: str | None) -> None:
    assert speech(template) == Speech(FORMATS[calls] if calls else None, STYLES[style] if style else None)


def test_a_named_format_stands_in_for_the_template_s() -> None:
    assert speech("{{ tools }}<tool_call></think>", "mistral", "none") == Speech(FORMATS["mistral"], None)
    assert speech("", "none", "deepseek_r1") == Speech(None, STYLES["deepseek_r1"])


@pytest.mark.parametrize(
    ("style", "prompt", "continued", "opened"),
    [
        ("think", "> ", "", False),
        ("think", "> <think>\n", "", True),
        ("think", "> <think>\n\n</think>\n\n", "", None),
        ("deepseek_r1", "> ", "", True),
        ("deepseek_r1", "> </think>", "", None),
        ("think", "> Because", "Because", None),
        ("deepseek_r1", "> Because", "Because", None),
        ("deepseek_r1", "> <think>Because", "<think>Because", True),
        ("think", "> <think>a</think>Because", "<think>a</think>Because", None),
        ("deepseek_r1", "> a</think>Because", "a</think>Because", None),
        ("deepseek_r1", "> ", " ", True),
    ],
)
def test_a_prompt_tells_whether_the_model_thinks(style: str, prompt: str, continued: str, opened: bool | None) -> None:
    assert STYLES[style].opened_by(prompt, continued) is opened


def test_thoughts_that_are_switched_off_are_there_only_where_the_prompt_opens_them() -> None:
    for style in ("think", "deepseek_r1"):
        found = [STYLES[style].opened_by(prompt, wanted=False) for prompt in ("> ", "> <think>\n", "> </think>")]
        assert found == [None, True, None]


@pytest.mark.parametrize("text", ["</think>\n\n a", "\n</think> a", "<think>\n</think>\n\na", "b</think> a"])
def test_white_space_behind_thoughts_is_no_content_though_there_are_none(text: str) -> None:
    parser = Speech(None, STYLES["deepseek_r1"]).parser(True, {})
    found = [event for part in text for event in parser.push(part)] + parser.finish()
    assert "".join(event.text for event in found if isinstance(event, Content)) == "a"
    assert "".join(event.text for event in found if isinstance(event, Reasoning)) == text[: text.find("b") + 1]
