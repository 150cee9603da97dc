"""Trials of grammars: whatever one of them does, it ends, and the next one goes on."""

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from aiollm.grammar.llguidance import GrammarError
from aiollm.grammar.trials import NoTrial, Trials
from aiollm.wire.sampling import Grammar
from aiollm.wire.vocabulary import Vocabulary

T = TypeVar("T")
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<|end|>"], special=[256], eos=[256])
AB = Grammar("regex", "ab?c")
ENDLESS = Grammar("json", '{"type": "integer", "multipleOf": 9999991}')
SECONDS = 20  # until a process that should have ended counts as one that does not


def trials_of(vocabulary: Vocabulary = BYTES, seconds: float = 5.0) -> Trials:
    return Trials(lambda: vocabulary, 300, seconds)


@pytest.fixture(scope="module")
def trials() -> Trials:
    return trials_of()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def chain(rules: int) -> str:
    """Each of the rules names the next one."""
    return "start: r0\n" + "\n".join(f'r{at}: r{at + 1} | "b"' for at in range(rules)) + f'\nr{rules}: "a"'


def names(rules: int) -> str:
    """Much the same in llama.cpp's syntax, which Python takes long to read."""
    return "root ::= r0\n" + "\n".join(f"r{at} ::= r{at + 1} r{at + 1}" for at in range(rules)) + f'\nr{rules} ::= "a"'


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("lark", chain(6000)), "nests too deeply"),
        (Grammar("regex", "["), "unclosed character class"),
        (Grammar("regex", "a\ud800"), "no text"),
    ],
    ids=["a stack overflow", "an error", "no text"],
)
def test_what_a_grammar_does_to_its_trial_is_told_and_the_next_one_goes_on(
    trials: Trials, grammar: Grammar, reason: str
) -> None:
    async def reason_of(grammar: Grammar) -> str:
        try:
            return (await trials.attempt(grammar)).reason
        except GrammarError as error:
            return str(error)

    assert reason in run(reason_of(grammar))
    assert run(trials.attempt(AB)).grammar == AB


@pytest.mark.parametrize("grammar", [ENDLESS, Grammar("ebnf", names(4000))], ids=["in Rust", "in Python"])
def test_what_takes_too_long_is_ended(grammar: Grammar) -> None:
    """Half a second of computing may take a machine that is busy longer; after two it is ended even so."""
    trials = trials_of(seconds=0.5)

    async def attempt() -> float:
        await trials.attempt(AB)
        began = time.monotonic()
        with pytest.raises((GrammarError, NoTrial), match=r"not compiled within 0\.5 s|too busy"):
            await trials.attempt(grammar)
        return time.monotonic() - began

    assert 0.5 <= run(attempt()) < 4.0, "others end of themselves, for want of memory, after 5"


def test_what_takes_too_much_memory_is_ended() -> None:
    with pytest.raises(GrammarError, match="takes too much memory"):
        run(trials_of(seconds=60.0).attempt(Grammar("regex", r"\pL" * 60_000)))


def test_the_process_begins_again_where_it_has_ended(trials: Trials) -> None:
    async def attempt() -> None:
        await trials.attempt(AB)
        first = trials._process
        assert first is not None
        first.kill()
        first.wait()
        assert (await trials.attempt(AB)).reason == ""
        assert trials._process is not first

    run(attempt())


def test_a_process_that_cannot_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.grammar.trials.sys.executable", "/bin/false")
    with pytest.raises(NoTrial, match="does not start"):
        run(trials_of().attempt(AB))


def test_a_model_that_cannot_end_follows_no_grammar() -> None:
    verdict = run(trials_of(Vocabulary(BYTES.pieces, [], [])).attempt(AB))
    assert "no end-of-sequence token" in verdict.reason and verdict.grammar is None


def test_nothing_outlives_its_owner() -> None:
    async def begun() -> list[int]:
        trials = trials_of(seconds=600.0)
        task = asyncio.create_task(trials.attempt(ENDLESS))
        while not (found := children(trials)):
            await asyncio.sleep(0.01)
        task.cancel()
        assert trials._process is not None
        return [trials._process.pid, *found]

    pids = run(begun())
    until = time.monotonic() + SECONDS
    while any(map(alive, pids)):
        assert time.monotonic() < until, "a process goes on"
        time.sleep(0.01)


def children(trials: Trials) -> list[int]:
    if trials._process is None:
        return []
    pid = trials._process.pid
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_signal_to_the_whole_group_does_not_end_it(trials: Trials) -> None:
    async def attempt() -> None:
        await trials.attempt(AB)
        process = trials._process
        assert process is not None
        for each in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(each)
        assert (await trials.attempt(AB)).reason == "" and trials._process is process

    run(attempt())
