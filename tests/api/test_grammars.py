"""Grammars are tried out beside the loop, once, within a size and a time."""

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_byte_tokenizer, write_wordpiece_tokenizer

from aiollm.api import grammars as grammars_module
from aiollm.api.grammars import MAX_BYTES, Grammars
from aiollm.grammar.llguidance import GrammarError
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar

WORDS = Grammar("regex", "[a-z]+")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(str(write_byte_tokenizer(tmp_path)))


def run(coroutine: Coroutine[Any, Any, Any]) -> None:
    asyncio.run(coroutine)


def counted(patch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[Grammar]:
    """The grammars that are compiled from here on, each of them after so many seconds."""
    asked: list[Grammar] = []
    original = grammars_module.matcher_of

    def matcher_of(grammar: Grammar, *rest: Any) -> Any:
        asked.append(grammar)
        time.sleep(seconds)
        return original(grammar, *rest)

    patch.setattr(grammars_module, "matcher_of", matcher_of)
    return asked


def test_many_who_ask_at_once_and_later_share_one_verdict(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, grammars = counted(monkeypatch), Grammars(tokenizer)

    async def ask() -> None:
        await asyncio.gather(*(grammars.check(WORDS) for _ in range(9)))
        await grammars.check(WORDS)
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed"):
                await grammars.check(Grammar("regex", "["))

    run(ask())
    assert asked == [WORDS, Grammar("regex", "[")]


def test_what_takes_too_long_is_refused_and_holds_nobody_up(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, seconds=0.5)
    grammars = Grammars(tokenizer, seconds=0.05)

    async def ask() -> None:
        with pytest.raises(GrammarError, match="was not compiled within"):
            await grammars.check(WORDS)

    run(ask())


def test_verdicts_are_kept_up_to_a_number_of_bytes(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, grammars = counted(monkeypatch), Grammars(tokenizer, kept=100)

    async def ask() -> None:
        for at in range(100):
            await grammars.check(Grammar("regex", f"word{at:06}"))
        assert 0 < grammars.kept <= 100
        await grammars.check(Grammar("regex", "word000099"))
        assert len(asked) == 100
        await grammars.check(Grammar("regex", "word000000"))
        assert len(asked) == 101

    run(ask())


def test_a_grammar_may_have_so_many_bytes(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match=f"at most {MAX_BYTES}"):
        run(Grammars(tokenizer).check(Grammar("regex", "é" * (MAX_BYTES // 2 + 1))))


def test_tokens_without_text_follow_no_grammar(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_wordpiece_tokenizer(tmp_path)))
    with pytest.raises(GrammarError, match="no text of their own"):
        run(Grammars(tokenizer).check(WORDS))
