"""Grammars are tried out beside the loop, once, within a size and a time."""

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer, write_wordpiece_tokenizer

from aiollm.api.errors import ApiError
from aiollm.api.grammars import AT_ONCE, MAX_BYTES, Grammars
from aiollm.api.schema import CompletionRequest
from aiollm.api.structured import asked_grammars
from aiollm.grammar.llguidance import GrammarError
from aiollm.grammar.trial import Verdict
from aiollm.grammar.trials import NoTrial, Trials
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar, Tag, Thoughts

T = TypeVar("T")
WORDS = Grammar("regex", "[a-z]+")
ENDLESS = Grammar("json", '{"type": "integer", "multipleOf": 9999991}')
THOUGHTS = Thoughts(Tag("<t>", (60, 116, 62), False), Tag("</t>", (60, 47, 116, 62), False), True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def counted(patch: pytest.MonkeyPatch) -> list[Grammar]:
    """The grammars that are tried out from here on."""
    asked: list[Grammar] = []
    original = Trials.attempt

    async def attempt(trials: Trials, grammar: Grammar) -> Verdict:
        asked.append(grammar)
        return await original(trials, grammar)

    patch.setattr(Trials, "attempt", attempt)
    return asked


def test_many_who_ask_at_once_and_later_share_one_verdict(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)

    async def ask() -> None:
        await asyncio.gather(*(grammars.check(WORDS) for _ in range(9)))
        await grammars.check(WORDS)
        for _ in range(2):
            with pytest.raises(GrammarError, match="unclosed"):
                await grammars.check(Grammar("regex", "["))

    run(ask())
    assert asked == [WORDS, Grammar("regex", "[")]


def test_what_takes_too_long_is_refused_for_good_and_holds_nobody_up(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, grammars = counted(monkeypatch), Grammars(tokenizer, seconds=0.5)

    async def refused() -> None:
        while True:
            with contextlib.suppress(ApiError):  # where this machine is busy, nobody knows whose fault it is
                with pytest.raises(GrammarError, match=r"too complex: it was not compiled within 0\.5 s"):
                    await grammars.check(ENDLESS)
                return

    async def ask() -> None:
        slow = asyncio.create_task(refused())
        await grammars.check(WORDS)
        assert not slow.done()
        await slow
        tried = len(asked)
        await refused()
        assert len(asked) == tried and grammars.kept == len(ENDLESS.source) + len(WORDS.source)

    run(ask())


def test_a_grammar_whose_turn_does_not_come_is_not_blamed_and_may_come_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, grammars = Trials.attempt, Grammars(tokenizer, seconds=0.05)
    slow = [Grammar("regex", f"slow{at}") for at in range(AT_ONCE)]

    async def ask() -> None:
        over, begun = asyncio.Event(), asyncio.Semaphore(0)

        async def attempt(trials: Trials, grammar: Grammar) -> Verdict:
            if grammar in slow:
                begun.release()
                await over.wait()
                return Verdict("slow")
            return await original(trials, grammar)

        monkeypatch.setattr(Trials, "attempt", attempt)
        tried = [asyncio.create_task(grammars.check(grammar)) for grammar in slow]
        for _ in slow:
            await begun.acquire()
        for _ in range(2):
            with pytest.raises(ApiError, match="turn did not come") as error:
                await grammars.check(WORDS)
            assert (error.value.status, error.value.code) == (503, "grammars_busy")
        assert grammars.kept == sum(len(grammar.source) for grammar in slow), "there is no verdict of it"
        over.set()
        found = await asyncio.gather(*tried, return_exceptions=True)
        assert [str(error) for error in found] == ["slow"] * AT_ONCE
        assert await grammars.check(WORDS) == WORDS

    run(ask())


def test_what_could_not_be_tried_out_is_tried_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(tokenizer)

    async def attempt(trials: Trials, grammar: Grammar) -> Verdict:
        raise NoTrial("no process")

    async def ask() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Trials, "attempt", attempt)
            with pytest.raises(ApiError, match="no process") as error:
                await grammars.check(WORDS)
            assert (error.value.status, error.value.code) == (503, "grammars_busy")
        assert await grammars.check(WORDS) == WORDS

    run(ask())


def test_workers_get_a_grammar_that_takes_no_python_to_read(grammars: Grammars) -> None:
    source = 'root ::= [a-c] "x"'
    for thoughts in (None, THOUGHTS):
        found = run(grammars.check(Grammar("ebnf", source, thoughts)))
        assert found.kind == "lark" and found.thoughts == thoughts
        assert run(grammars.check(found)) == found


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


def test_a_grammar_may_have_so_many_bytes(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match=f"at most {MAX_BYTES}"):
        run(grammars.check(Grammar("regex", "é" * (MAX_BYTES // 2 + 1))))


def test_tokens_without_text_follow_no_grammar(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_wordpiece_tokenizer(tmp_path)))
    with pytest.raises(GrammarError, match="no text of their own"):
        run(Grammars(tokenizer).check(WORDS))


def test_a_client_is_told_to_come_back_where_there_is_no_room(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
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
    grammars: Grammars, kind: Any, source: str, reason: str
) -> None:
    for grammar in (Grammar(kind, source), Grammar(kind, source, THOUGHTS))[: 1 if "no text" in reason else 2]:
        with pytest.raises(GrammarError) as refused:
            run(grammars.check(grammar))
        assert str(refused.value) == reason
