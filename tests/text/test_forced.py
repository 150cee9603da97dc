"""What is drawn by the grammar of demanded calls is calls, and the parser of its format reads them all."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from outputs import FUNCTIONS, NOW, PARIS, hermes

from aiollm.grammar.llguidance import HEAD
from aiollm.text.folder import TextError
from aiollm.text.parsers.formats import FORMATS, MISTRAL_ARGS, Format, Speech
from aiollm.text.parsers.source import Arguments, Call, Content, End
from aiollm.wire.sampling import Tag

EOS = 256
WANTED = b'"}],: \n{<'  # bytes that bring an output to its end, drawn more often than others
MOST = 3000  # bytes of an output
MARKS = sorted({mark for format in FORMATS.values() for mark in format.marks})


class Bytes(TokenizerWrapper):
    """A token for each byte, one for the end, and one for each mark, which is special."""

    def __init__(self) -> None:
        self.eos_token_id, self.bos_token_id = EOS, None
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"", *map(str.encode, MARKS)]
        self.special_token_ids = [*range(EOS, len(self.tokens))]
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


TOKENIZER = LLTokenizer(Bytes(), eos_token=[EOS])
TAGS = [Tag(mark, (EOS + 1 + at,), True) for at, mark in enumerate(MARKS)]


def matcher(lark: str) -> LLMatcher:
    found = LLMatcher(TOKENIZER, HEAD + lark, log_level=0)
    assert not found.is_error(), found.get_error()
    return found


def drawn(lark: str, seed: int) -> str:
    """A random text of the grammar."""
    draw, found, data = random.Random(seed), matcher(lark), bytearray()
    while len(data) < MOST:
        bits = np.unpackbits(np.frombuffer(found.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        if EOS in allowed:
            break
        wanted = [id for id in allowed if id in WANTED]
        data.append(draw.choice(wanted if wanted and draw.random() < 0.7 else allowed))
        assert found.consume_token(data[-1])
    else:
        pytest.fail("no end")
    return data.decode()


def accepts(lark: str, text: str, tags: Sequence[Tag] = ()) -> bool:
    """Whether the text is one of the grammar's; tags are one token each."""
    found, ids = matcher(lark), {tag.text: tag.ids[0] for tag in tags}
    parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    tokens = [token for part in parts for token in ([ids[part]] if part in ids else part.encode())]
    return all(found.consume_token(token) for token in tokens) and found.is_accepting()


@pytest.mark.parametrize("calls", sorted(FORMATS))
def test_what_is_drawn_by_it_is_calls_and_nothing_else(calls: str) -> None:
    speech = Speech(FORMATS[calls])
    lark = speech.forced(FUNCTIONS, one=False)
    for seed in range(8):
        text = drawn(lark, seed)
        reader = speech.demanding.parser(False, FUNCTIONS)
        events = reader.push(text) + reader.finish()
        assert reader.calls >= 1 and not reader.open, text
        assert not any(isinstance(event, Content) for event in events), text
        assert all(event.name in FUNCTIONS for event in events if isinstance(event, Call))
        arguments = [event.text for event in events if isinstance(event, Arguments)]
        assert len(arguments) == reader.calls == events.count(End())
        assert all(isinstance(json.loads(each), dict) for each in arguments), text


@pytest.mark.parametrize("calls", ["hermes", "glm"])
def test_calls_as_the_model_writes_them_are_texts_of_it(calls: str) -> None:
    speech = Speech(FORMATS[calls])
    several = f"{hermes('get_weather', PARIS)}\n{hermes(*NOW)}"
    lark = speech.forced(FUNCTIONS, one=False)
    assert all(accepts(lark, text) for text in (hermes(*NOW), several))
    others = ("", "Hello", hermes("other", "{}"), f"Hello {hermes(*NOW)}", "<think>")
    assert not any(accepts(lark, text) for text in others)
    one = speech.forced(FUNCTIONS, one=True)
    assert accepts(one, hermes(*NOW)) and not accepts(one, several)
    named = speech.forced({"get_weather": FUNCTIONS["get_weather"]}, one=True)
    assert accepts(named, hermes("get_weather", PARIS)) and not accepts(named, hermes(*NOW))
    assert not accepts(named, hermes("get_weather", '{"city": 5}'))


def test_odd_names_and_schemas_stay_within_their_quotes() -> None:
    schema = {"properties": {'"\n': {"const": 'a"} /x/ \\'}}, "required": ['"\n'], "additionalProperties": False}
    lark = Speech(FORMATS["hermes"]).forced({"a.b-c_1": schema}, one=True)
    assert accepts(lark, hermes("a.b-c_1", json.dumps({'"\n': 'a"} /x/ \\'})))


@pytest.mark.parametrize("calls", ["hermes", "mistral", "deepseek"])
def test_text_may_be_anything_until_a_mark_demands_a_proper_call(calls: str) -> None:
    speech = Speech(FORMATS[calls])
    lark, frame = (
        speech.guarded({"get_weather": {**FUNCTIONS["get_weather"], "required": ["city"]}}),
        FORMATS[calls].frame,
    )
    assert lark is not None and frame is not None
    before, after = frame.begin + frame.before + "get_weather" + frame.between, frame.after + frame.end
    good, bad = f"{before}{PARIS}{after}", f"{before}{{}}{after}"
    for text in ("", "Hello {} <tool [TOOL", good, f"Well.\n{good}", f"{good}\n{good} So <"):
        assert accepts(lark, text), text
    for text in (frame.mark, bad, f"{good}{bad}", f"{good} {frame.mark}"):
        assert not accepts(lark, text), text
    events = speech.parser(False, FUNCTIONS).push(f"Well.\n{good}")
    assert events[:2] == [Content("Well."), Call("get_weather")]


ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "size": {"type": "string", "enum": ["small", "large"]},
        "count": {"type": "integer"},
        "note": {"type": "string"},
        "code": {"type": "string", "minLength": 2, "maxLength": 3},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["size", "count"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string"}},
}
GOOD: list[dict[str, Any]] = [
    {"size": "small", "count": 3}, {"size": "large", "count": -1, "note": "a\nb <x> \"'"},
    {"size": "small", "count": 3, "code": "ab", "tags": []},
    {"size": "small", "count": 3, "tags": ["</parameter></arg_value></tool_call>", "\\\""]},
]  # fmt: skip
BAD: list[dict[str, Any]] = [
    {}, {"size": "small"}, {"size": "tiny", "count": 3}, {"size": "small", "count": "three"},
    {"size": "small", "count": 1.5},
    {"size": "small", "count": 3, "code": "abcd"}, {"size": "small", "count": 3, "code": "a"},
    {"size": "small", "count": 3, "other": 1}, {"size": "small", "count": 3, "tags": [5]},
]  # fmt: skip


def written(format: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as models of the format write it."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    text, glm = json.dumps(arguments), "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
    match format:
        case "hermes":
            return hermes(name, text)
        case "llama3":
            return f'<|python_tag|>{{"name": "{name}", "parameters": {text}}}'
        case "mistral":
            return f'[TOOL_CALLS][{{"name": "{name}", "arguments": {text}}}]'
        case "mistral_args":
            return f"[TOOL_CALLS]{name}[ARGS]{text}"
        case "deepseek":
            marks = FORMATS["deepseek"].marks
            return f"{marks[0]}{marks[2]}{name}{marks[4]}{text}{marks[3]}{marks[1]}"
        case "glm":
            return f"<tool_call>{name}\n{''.join(glm.format(*item) for item in values.items())}</tool_call>"
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


FORMAT = {**FORMATS, "mistral_args": MISTRAL_ARGS}
GUARDED = sorted(FORMAT.keys() - {"pythonic"})


def calls_of(format: Format, text: str, tools: dict[str, Any]) -> list[tuple[str, Any]]:
    reader = Speech(format).parser(False, tools)
    events = reader.push(text) + reader.finish()
    names = [event.name for event in events if isinstance(event, Call)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", GUARDED)
def test_calls_among_text_are_those_that_the_schema_allows(name: str, special: bool) -> None:
    format, tools = FORMAT[name], {"order": ORDER, "loose": {}}
    tags = [tag for tag in TAGS if special and tag.text in format.marks]
    lark = Speech(format).guarded(tools, tags)
    for text in ("", "Hello {} <tool [TOOL", '{"a": 1}'):
        assert accepts(lark, text, tags), text
    # what closes an argument is no text of one where it is a special token
    good = [each for each in GOOD if not (special and "</arg_value>" in str(each))]
    for arguments in good:
        call = written(name, "order", arguments)
        assert accepts(lark, call, tags) and accepts(lark, f"Well.\n{call}", tags), call
        assert calls_of(format, call, tools) == [("order", arguments)]
    for arguments in BAD:
        assert not accepts(lark, written(name, "order", arguments), tags), arguments
    assert accepts(lark, written(name, "loose", {"what": "x", "ever": "y"}), tags)
    assert not accepts(lark, written(name, "other", good[0]), tags)
    mark = written(name, "", {})[: len(format.marks[0])]
    assert not accepts(lark, f"Well {mark}", tags)
    if special:  # nor is it spelled
        assert not accepts(lark, f"Well {mark}") and not accepts(lark, written(name, "order", good[0]))


@pytest.mark.parametrize("name", sorted(FORMAT))
def test_calls_that_are_demanded_have_special_tokens_where_marks_are_some(name: str) -> None:
    speech = Speech(FORMAT[name])
    assert speech.demanding.calls is not None
    tags = [tag for tag in TAGS if tag.text in speech.demanding.calls.marks]
    lark = speech.forced({"order": ORDER}, True, tags)
    wrote = name if FORMAT[name].frame is not None else "hermes"
    call = written(wrote, "order", GOOD[0]).removeprefix("<|python_tag|>")
    assert accepts(lark, call, tags)
    assert name == "llama3" or not accepts(lark, call)


def test_an_answer_of_llama_that_names_a_function_is_a_call_of_it() -> None:
    format = FORMATS["llama3"]
    lark = Speech(format).guarded({"order": ORDER, "loose": {}})
    good = json.dumps(GOOD[0])
    for text in (
        f'{{"name": "order", "parameters": {good}}}', f'{{"type":"function","name":"order","arguments":{good} }}',
        f'{{"name": "loose", "parameters": {{}}}}; {{"name": "order", "parameters": {good}}}',
    ):  # fmt: skip
        assert accepts(lark, text), text
        assert calls_of(format, text, {"order": ORDER, "loose": {}})[-1] == ("order", GOOD[0])
    assert accepts(lark, '{"name": "Bob", "arguments": {}}')
    for text in (
        '{"name": "order", "parameters": {}}', '{"parameters": {}, "name": "order"}', ' {"name": "loose"}',
        '{"n\\u0061me": "order", "parameters": {}}', '{"function": "or\\u0064er"}',
    ):  # fmt: skip
        assert not accepts(lark, text), text


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "x"}}}, {"properties": {"a": {"$ref": "#"}}},
        {"properties": {"a<": {}}}, {"anyOf": [{}]}, {"type": "string"}, {"required": [{}]}, {"properties": []},
        {"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}},
        {"properties": {"a": {"type": "string", "enum": [5]}}}, {"properties": {"a": {"type": "string", "enum": 5}}},
    ],
)  # fmt: skip
def test_what_cannot_be_followed_between_tags_is_refused(schema: dict[str, Any]) -> None:
    for name in ("glm", "qwen3_coder"):
        with pytest.raises(TextError):
            Speech(FORMATS[name]).guarded({"f": schema})


def test_pythonic_calls_cannot_be_guarded() -> None:
    assert not Speech(FORMATS["pythonic"]).guards and not Speech().guards
    assert all(Speech(FORMAT[name]).guards for name in GUARDED)
