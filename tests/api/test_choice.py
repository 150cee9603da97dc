"""A choice by itself: however its tokens are cut, taken and stopped, text, logprobs and offsets agree."""

import random
from pathlib import Path

import numpy as np
import pytest

from aiollm.api.choice import Choice, Delta, Output
from aiollm.engine.request import Finish, PromptToken, Token
from aiollm.text.parsers.formats import speech as speech_of
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import SamplingParams

EOS = 258


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(str(folder))


def choice(tokenizer: Tokenizer, output: Output, prompt: str = "p", **sampling: int) -> Choice:
    return Choice(
        0, "id", np.array(list(prompt.encode()), np.int64), SamplingParams(stop_ids=(EOS,), **sampling),
        tokenizer, output, namespace="", arrived=0.0, on_text=lambda: None, on_end=lambda: None,
        inter_token=lambda seconds: None,
    )  # fmt: skip


def feed(made: Choice, text: str, rng: random.Random, max_tokens: int = 10_000) -> list[Delta]:
    """Give a text as byte tokens and EOS, as the engine's judge would; take at random moments."""
    deltas = []
    ids = [*text.encode(), EOS]
    for at, token_id in enumerate(ids):
        stop = made.token(Token(token_id, -1.0, (), token_id == EOS))
        if token_id == EOS or stop is not None:
            made.finished(Finish("stop", stop))
            break
        if at + 1 == max_tokens:
            made.finished(Finish("length"))
            break
        if rng.random() < 0.5:
            deltas.append(made.take())
    deltas.append(made.take())
    assert made.take() is None
    return [delta for delta in deltas if delta is not None]


def test_with_a_parser_the_text_is_told_as_it_was_written(tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    speech = speech_of("<tool_call> </think>", "auto", "auto")
    for text in (
        "<think> hm </think> \n\n Sky : \n\n - blue ",
        'a <tool_call>\n{"name": "f"}\n</tool_call>\n',
        " ",
        "",
    ):
        for _ in range(20):
            output = Output(keep_entries=True, parser=lambda: speech.parser(False, {"f": {}}, one_call=False))
            assert "".join(delta.text for delta in feed(choice(tokenizer, output), text, rng)) == text


def test_random_texts_stops_and_cuts_agree_with_a_plain_search(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text = "".join(rng.choices(["a", "b", "é", "🙂", "你"], k=rng.randrange(12)))
        stops = ["".join(rng.choices("abé你🙂", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        include = rng.random() < 0.5
        deltas = feed(choice(tokenizer, Output(stops, include, keep_entries=True)), text, rng)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text if not ends else text[: min(ends)[0 if include else 1]]
        assert "".join(delta.text for delta in deltas) == expected
        entries = [entry for delta in deltas for entry in delta.entries]
        assert bytes(entry.id for entry in entries).decode() == expected
        assert [entry.start for entry in entries] == [
            at for at, character in enumerate(expected) for _ in character.encode()
        ]


def test_entries_come_with_the_text_that_they_make(tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    for _ in range(200):
        text = "".join(rng.choices(["a", "é", "🙂"], k=8))
        for delta in feed(choice(tokenizer, Output(("ab",), keep_entries=True)), text, rng):
            assert bytes(entry.id for entry in delta.entries).decode() == delta.text


def test_a_length_within_a_character_gives_every_entry_out(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output(keep_entries=True))
    deltas = feed(made, "🙂", random.Random(1), max_tokens=2)
    assert "".join(delta.text for delta in deltas) == "\ufffd"
    assert [entry.id for delta in deltas for entry in delta.entries] == list("🙂".encode())[:2]


def test_skipped_special_tokens_keep_their_entries(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output(keep_entries=True))
    for token_id in (97, 257, 98):
        made.token(Token(token_id, -1.0, (), False))
    made.finished(Finish("length"))
    delta = made.take()
    assert delta is not None and delta.text == "ab"
    assert [(entry.id, entry.start) for entry in delta.entries] == [(97, 0), (257, 1), (98, 1)]


def test_nothing_is_held_back_or_kept_after_a_stop(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output(("stop",), keep_entries=True))
    deltas = feed(made, "sto stop more", random.Random(2))
    assert "".join(delta.text for delta in deltas) == "sto "
    assert made.generated == len("sto stop")


def test_the_echo_waits_for_the_scores_of_the_prompt(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output(keep_entries=True, echo=True), "pro", prompt_logprobs=0)
    assert made.take() is None
    made.prompt_tokens([PromptToken(1, -1.0, 1, ())])
    made.prompt_tokens([PromptToken(2, -2.0, 1, ())])
    assert made.take() is None
    made.token(Token(97, -3.0, (), False))
    delta = made.take()
    assert delta is not None and delta.text == "proa"
    assert [(entry.logprob, entry.start) for entry in delta.entries] == [(None, 0), (-1.0, 1), (-2.0, 2), (-3.0, 3)]


def test_offsets_in_an_echo_leave_out_what_was_put_before_the_text(tokenizer: Tokenizer) -> None:
    lead = len("<|endoftext|>")
    output = Output(keep_entries=True, echo=True, echo_text="ab", echo_lead=lead)
    made = Choice(
        0, "id", np.array([256, 97, 98]), SamplingParams(prompt_logprobs=0), tokenizer, output, namespace="",
        arrived=0.0, on_text=lambda: None, on_end=lambda: None, inter_token=lambda seconds: None,
    )  # fmt: skip
    made.prompt_tokens([PromptToken(1, -1.0, 1, ()), PromptToken(2, -1.0, 1, ())])
    made.token(Token(99, -1.0, (), False))
    delta = made.take()
    assert delta is not None and delta.text == "abc"
    assert [(entry.id, entry.start) for entry in delta.entries] == [(256, 0), (97, 0), (98, 1), (99, 2)]


def test_an_error_gives_out_nothing_more(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output(("xy",)))
    made.token(Token(ord("x"), -1.0, (), False))
    made.finished(Finish("error", error="broken"))
    assert made.take() is None


def test_text_that_waits_until_it_is_taken_is_the_same(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for shown in (False, True):
        for _ in range(300):
            text = "".join(rng.choices(["a", "é", "🙂", "你"], k=rng.randrange(9)))
            output = Output(include_stop=shown, skip_special_tokens=False, print_eos=shown)
            made, deltas = choice(tokenizer, output), []
            for token_id in [*text.encode(), EOS]:
                made.request.output.append(token_id)  # as the judge does
                assert made.token(Token(token_id, -1.0, (), token_id == EOS)) is None
                if rng.random() < 0.4:
                    deltas.append(made.take())
            made.finished(Finish("stop"))
            deltas.append(made.take())
            assert made.take() is None and made.ids == made.request.output
            found = "".join(delta.text for delta in deltas if delta is not None)
            assert found == text + ("<|im_end|>" if shown else "")


def test_an_unfinished_character_that_waits_shows_at_the_end(tokenizer: Tokenizer) -> None:
    made = choice(tokenizer, Output())
    for token_id in b"a\xf0\x9f":
        made.request.output.append(token_id)
        made.token(Token(token_id, -1.0, (), False))
    made.finished(Finish("length"))
    delta = made.take()
    assert delta is not None and delta.text == "a\ufffd"


def test_where_ids_are_told_each_has_an_entry_those_of_a_stop_string_too(tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    for text, stops, told in (("abcd", ["cd"], "abcd"), ("ab", [], "ab"), ("abce", ["bc", "x"], "abc")):
        made = choice(tokenizer, Output(stops, keep_entries=True, end_entry=True))
        entries = [entry.id for delta in feed(made, text, rng) for entry in delta.entries]
        assert entries == [*told.encode(), *([EOS] if not stops else [])]
        made = choice(tokenizer, Output(stops, keep_entries=True))
        hidden = len("".join(delta.text for delta in feed(made, text, rng)))
        assert hidden == len(text.partition(stops[0])[0] if stops else text)
