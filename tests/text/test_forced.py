"""What is drawn by the grammar of demanded calls is calls, and the parser of its format reads them all."""

import json
import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from outputs import FUNCTIONS, NOW, PARIS, hermes

from aiollm.grammar.llguidance import HEAD
from aiollm.text.parsers.formats import FORMATS, Speech
from aiollm.text.parsers.source import Arguments, Call, Content, End

EOS = 256
WANTED = b'"}],: \n{<'  # bytes that bring an output to its end, drawn more often than others
MOST = 3000  # bytes of an output


class Bytes(TokenizerWrapper):
    """A token for each byte, and one for the end."""

    def __init__(self) -> None:
        self.eos_token_id, self.bos_token_id = EOS, None
        self.tokens = [*(bytes([byte]) for byte in range(256)), b""]
        self.special_token_ids = [EOS]
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


TOKENIZER = LLTokenizer(Bytes(), eos_token=[EOS])


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


def accepts(lark: str, text: str) -> bool:
    """Whether the text is one of the grammar's."""
    found = matcher(lark)
    return all(found.consume_token(byte) for byte in text.encode()) and found.is_accepting()


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


def test_formats_without_a_mark_cannot_be_guarded() -> None:
    assert not (Speech(FORMATS["llama3"]).guards or Speech(FORMATS["glm"]).guards or Speech().guards)
    assert Speech(FORMATS["hermes"]).guards
