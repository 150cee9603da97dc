"""Grammars of clients, in Lark's syntax and in llama.cpp's, as they are meant."""

import pytest
from llguidance import LLTokenizer

from aiollm.grammar.llguidance import GrammarError, matcher_of
from aiollm.wire.sampling import Grammar


@pytest.mark.parametrize(
    ("source", "taken", "refused"),
    [
        ('?start: select\n?select: "SELECT " col\n?col: /[a-z]+/', "SELECT abc", "abc"),
        ('!start: "a"', "a", "b"),
        ('other: "a"\n  start : other', "a", "b"),
        ('root ::= "\\u00e9\\U0001F600"', "é😀", "e"),
        ("root ::= [\\u4e00-\\u9fff]+", "一丁", "a"),
        ("root ::= [^\\u0000-\\u001f]", "x", "\x01"),
        ("root ::= [^\\u005d]", "x", "]"),
        ('root ::= "\\\\u0041"', "\\u0041", "A"),
        ('root ::= "\\u005C\\u0022"', '\\"', "\\"),
    ],
)
def test_a_grammar_takes_what_it_says(source: str, taken: str, refused: str, tokens: LLTokenizer) -> None:
    matcher = matcher_of(Grammar("ebnf", source), tokens)
    for text, whole in ((taken, True), (refused, False)):
        follows, ids = matcher.deep_copy(), list(text.encode())
        assert (follows.try_consume_tokens(ids) == len(ids) and follows.is_accepting()) == whole, text


def test_a_number_of_no_character_is_told(tokens: LLTokenizer) -> None:
    with pytest.raises(GrammarError, match=r"it cannot be read: \\ud800 is no character"):
        matcher_of(Grammar("ebnf", 'root ::= "\\ud800"'), tokens)
