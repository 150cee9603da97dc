"""Grammars are tried out beside the loop, once, within a size and a time."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer, write_wordpiece_tokenizer

from aiollm.api import grammars as grammars_module
from aiollm.api.errors import ApiError
from aiollm.api.grammars import MAX_BYTES, THREADS, Grammars
from aiollm.api.schema import CompletionRequest
from aiollm.api.structured import asked_grammars
from aiollm.grammar.llguidance import GrammarError
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar, Tag, Thoughts

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


def test_a_grammar_that_found_no_thread_is_not_blamed_and_may_come_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, begun = threading.Event(), threading.Semaphore(0)
    original = grammars_module.matcher_of

    def matcher_of(grammar: Grammar, *rest: Any) -> Any:
        begun.release()
        assert over.wait(10)
        return original(grammar, *rest)

    monkeypatch.setattr(grammars_module, "matcher_of", matcher_of)
    grammars = Grammars(tokenizer, seconds=0.05)
    slow = [Grammar("regex", f"slow{at}") for at in range(THREADS)]

    async def ask() -> None:
        tried = [asyncio.create_task(grammars.check(grammar)) for grammar in slow]
        for _ in slow:
            await asyncio.to_thread(begun.acquire)
        for _ in range(2):
            with pytest.raises(ApiError) as error:
                await grammars.check(WORDS)
            assert (error.value.status, error.value.code) == (503, "grammars_busy")
        assert grammars.kept == sum(len(grammar.source) for grammar in slow), "there is no verdict of it"
        found = await asyncio.gather(*tried, return_exceptions=True)
        assert ["not compiled within" in str(error) for error in found] == [True] * THREADS
        over.set()
        async with asyncio.timeout(10):
            for grammar in (WORDS, *slow):
                while True:
                    with contextlib.suppress(ApiError, GrammarError):
                        await grammars.check(grammar)
                        break

    run(ask())


def test_choices_that_are_too_long_are_not_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ((field, make),) = asked_grammars(CompletionRequest(prompt="", guided_choice=["a.", "b"]))
    assert (field, make()) == ("guided_choice", Grammar("regex", r"a\.|b"))
    ((_, make),) = asked_grammars(CompletionRequest(prompt="", guided_choice=["x" * 1024] * 4096))
    monkeypatch.setattr("aiollm.api.structured.re", None)
    with pytest.raises(GrammarError, match=f"at most {MAX_BYTES}"):
        make()


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


def test_a_client_is_told_to_come_back_where_no_thread_is_free(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = served.stand.parts.grammars
    monkeypatch.setattr(grammars, "_seconds", 0.01)
    monkeypatch.setattr(grammars, "_free", asyncio.Semaphore(0))

    async def ask() -> None:
        body = {"prompt": "x", "guided_regex": "never tried before"}
        async with served.stand.session.post(served.stand.url + "/v1/completions", json=body) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "5")
            error = (await response.json())["error"]
            assert (error["code"], error["param"], error["type"]) == ("grammars_busy", None, "server_error")

    served.run(ask())


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "[a", "unclosed character class"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("json", '{"type": "x"}', "failed to compile JSON schema: Invalid type: x"),
        ("json", '{"pattern": "[a"}', "failed to compile JSON schema: regex parse error: unclosed character class"),
        ("ebnf", 'start: x\nx: "a" y', 'line 2: unknown name: "y"'),
        ("ebnf", "start: a\na: a", "there is no text that follows it"),
        ("lark", "start: x", 'unknown name: "x"'),
    ],
)
def test_a_refusal_is_the_reason_and_shows_nothing_but_the_client_s_own(
    tokenizer: Tokenizer, kind: Any, source: str, reason: str
) -> None:
    thoughts = Thoughts(Tag("<t>", (60, 116, 62), False), Tag("</t>", (60, 47, 116, 62), False), True)
    for grammar in (Grammar(kind, source), Grammar(kind, source, thoughts))[: 1 if "no text" in reason else 2]:
        with pytest.raises(GrammarError) as refused:
            run(Grammars(tokenizer).check(grammar))
        assert str(refused.value) == reason
