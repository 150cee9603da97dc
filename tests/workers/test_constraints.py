"""Masks of constrained rows, from admission to the next token."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llguidance._lib import LLParserLimits
from overlap import LateThreads
from updates import run_of

from aiollm.grammar import llguidance
from aiollm.grammar.llguidance import GrammarError
from aiollm.wire.columns import pack
from aiollm.wire.messages import Admit, Update
from aiollm.wire.sampling import (
    AllowedIds,
    BannedWords,
    Constraint,
    FirstIds,
    Grammar,
    Healing,
    SamplingParams,
    Tag,
    ThoughtLimit,
    Thoughts,
)
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers import constraints as constraints_module
from aiollm.workers.building import Builders, Stuck, Watch
from aiollm.workers.constraints import Constraints
from aiollm.workers.filters import Words
from aiollm.workers.lexers import KEPT
from aiollm.workers.replay import Now

SECONDS = 20  # what takes longer hangs
EOS = 256
SIZE = 300
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<|end|>"], special=[EOS], eos=[EOS])
AB = Grammar("regex", "ab?c")
TAGS = Tag("<t>", tuple(b"<t>"), False), Tag("</t>", tuple(b"</t>"), False)
WIDE = Grammar("regex", "[ab]*a[ab]{6}c")  # whose lexer meets a new state at most of its tokens


class Counting(Now):
    asked = 0

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.asked += 1
        return super().submit(function, *args, **kwargs)


def complete(threads: LateThreads) -> None:
    while threads.queue:
        threads.complete()


def constraints_of(vocabulary: Vocabulary | None = BYTES) -> Constraints:
    return Constraints(vocabulary, SIZE, Now(), Now())


def admit(
    constraints: Constraints, row: int, *own: Constraint, prompt: Sequence[int] = (97, 98), output: Sequence[int] = (),
    **sampling: Any,
) -> None:  # fmt: skip
    """A row of a prompt, and of what it put out before a pause."""
    tokens = [*prompt, *output]
    params = SamplingParams(constraints=own, **sampling)
    admitted = Admit(row, 1, len(prompt), len(tokens), 100, params)
    constraints.apply(Update(number=1, admit=[admitted], tokens=run_of(row, 0, tokens)))


def allowed(constraints: Constraints, *rows: int) -> list[list[int]]:
    """The ids that rows may draw; nothing may fail."""
    lines = np.zeros((len(rows), constraints.words), np.int32)
    assert constraints.fill(rows, lines) == ({}, [])
    return list(map(ids_of, lines))


def ids_of(line: Words) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(line.view(np.uint8), bitorder="little")[:SIZE]).tolist()
    return found


def failure(constraints: Constraints, row: int) -> str:
    lines = np.zeros((1, constraints.words), np.int32)
    filled = constraints.fill([row], lines)
    assert not lines.any(), "nothing may be drawn"
    return filled.failures[row].text


def test_a_grammar_is_followed_from_the_first_generated_token_to_the_end_of_sequence() -> None:
    constraints = constraints_of()
    admit(constraints, 3, AB)
    for token, before in [(97, [97]), (98, [98, 99]), (99, [99])]:
        assert allowed(constraints, 3) == [before]
        constraints.take(3, token)
    assert allowed(constraints, 3) == [[EOS]]


def test_rows_have_lines_of_their_own() -> None:
    constraints = constraints_of()
    admit(constraints, 0, AB)
    admit(constraints, 1, AllowedIds((5, 299)))
    admit(constraints, 2, AB, output=[97])
    assert allowed(constraints, 2, 1, 0) == [[98, 99], [5, 299], [97]]


def test_a_matcher_is_built_again_from_what_was_generated_before_a_pause() -> None:
    constraints = constraints_of()
    admit(constraints, 0, AB, BannedWords(((98, 99),)), output=[97, 98])
    assert "no token" in failure(constraints, 0), "the prompt is no part of it, the output is"
    admit(constraints, 0, AB, output=[97, 98, 99])
    assert allowed(constraints, 0) == [[EOS]]


def test_tokens_of_an_admission_may_come_in_several_runs() -> None:
    constraints = constraints_of()
    row = Admit(0, 1, 2, 4, 100, SamplingParams(constraints=(AB,)))
    constraints.apply(Update(number=1, admit=[row], tokens=run_of(0, 0, [1])))
    constraints.apply(Update(number=2, tokens=run_of(0, 1, [2, 97])))
    constraints.apply(Update(number=3, tokens=run_of(0, 3, [98])))
    assert allowed(constraints, 0) == [[99]]


def test_the_last_id_of_a_banned_word_is_not_drawn_behind_the_others() -> None:
    constraints = constraints_of()
    admit(constraints, 0, BannedWords(((7,), (1, 2, 3), (2, 4))), prompt=[1, 2])
    every = set(range(SIZE))
    assert set(allowed(constraints, 0)[0]) == every - {7}, "a prompt is not generated"
    constraints.take(0, 1)
    constraints.take(0, 2)
    assert set(allowed(constraints, 0)[0]) == every - {7, 3, 4}
    constraints.take(0, 2)
    assert set(allowed(constraints, 0)[0]) == every - {7, 4}


def test_no_end_before_min_tokens_unless_nothing_else_is_left() -> None:
    constraints = constraints_of()
    admit(constraints, 0, Grammar("regex", "a{1,2}"), min_tokens=5, stop_ids=(EOS,))
    constraints.take(0, 97)
    assert allowed(constraints, 0) == [[97]]
    constraints.take(0, 97)
    assert allowed(constraints, 0) == [[EOS]]


def test_ids_that_have_no_text_are_in_no_grammar() -> None:
    constraints = constraints_of()
    admit(constraints, 0, Grammar("regex", "(?s:.)*"))
    assert {0x0A, 0x41, EOS} <= set(allowed(constraints, 0)[0]) <= set(range(257))
    admit(constraints, 1, Grammar("regex", "<\\|end\\|>"))
    assert allowed(constraints, 1) == [[ord("<")]], "a special token is no text"


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (Grammar("regex", "("), "unclosed"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("json", "[1"), "no JSON"),
        (AllowedIds(()), "allow no token"),
    ],
)
def test_a_matcher_that_fails_costs_its_own_row(own: Constraint, reason: str) -> None:
    constraints = constraints_of()
    admit(constraints, 0, own)
    admit(constraints, 1, AB)
    lines = np.zeros((2, constraints.words), np.int32)
    failures = constraints.fill([0, 1], lines).failures
    assert list(failures) == [0] and reason in failures[0].text
    assert not lines[0].any() and allowed(constraints, 1) == [[97]]


def test_a_token_that_a_grammar_does_not_allow_is_told() -> None:
    constraints = constraints_of()
    admit(constraints, 0, AB, output=[99])
    assert "doesn't satisfy the grammar" in failure(constraints, 0)


def test_without_a_vocabulary_grammars_fail_and_filters_do_not() -> None:
    constraints = constraints_of(None)
    admit(constraints, 0, AB)
    admit(constraints, 1, AllowedIds((4,)))
    assert "no text of their own" in failure(constraints, 0)
    assert allowed(constraints, 1) == [[4]]


def test_the_first_token_alone_is_one_of_the_first_ids() -> None:
    constraints = constraints_of()
    admit(constraints, 1, FirstIds((7, 299)))
    admit(constraints, 2, FirstIds((7,)), output=[99])
    assert allowed(constraints, 1, 2) == [[7, 299], list(range(SIZE))]
    constraints.take(1, 7)
    assert allowed(constraints, 1) == [list(range(SIZE))]


def test_a_cut_text_is_healed_byte_by_byte_and_then_all_is_free() -> None:
    constraints = constraints_of()
    admit(constraints, 1, Healing(b"ab"))
    admit(constraints, 2, Healing(b"ab"), output=[97])
    assert allowed(constraints, 1, 2) == [[97], [98]]
    constraints.take(2, 98)
    assert allowed(constraints, 2) == [list(range(SIZE))]


def test_without_a_vocabulary_nothing_is_healed() -> None:
    constraints = constraints_of(None)
    admit(constraints, 1, Healing(b"ab"))
    assert failure(constraints, 1) == "the tokens of this model have no text of their own"


def test_a_retired_row_is_forgotten_and_its_successor_starts_anew() -> None:
    constraints = constraints_of()
    admit(constraints, 0, AB, output=[97])
    constraints.apply(Update(number=2, retire=pack([0])))
    admit(constraints, 0, AB)
    assert allowed(constraints, 0) == [[97]]


def test_a_grammar_that_only_retired_rows_wait_for_is_not_begun() -> None:
    threads = LateThreads()
    constraints = Constraints(BYTES, SIZE, threads, Now())
    for row, source in enumerate(["a", "b", "b", "c"]):
        admit(constraints, row, Grammar("regex", source))
    constraints.apply(Update(number=2, retire=pack([0, 1])))
    complete(threads)
    assert threads.begun == 1 + 2, "the tokenizer's, and those of b and c"
    admit(constraints, 0, Grammar("regex", "a"))
    assert constraints.unbuilt() == [0], "who comes later has it built"
    complete(threads)
    assert constraints.unbuilt() == [] and allowed(constraints, 0, 2, 3) == [[97], [98], [99]]


def test_what_has_not_begun_when_a_worker_ends_never_does() -> None:
    begun, end = threading.Event(), threading.Event()
    threads = ThreadPoolExecutor(1)
    threads.submit(lambda: (begun.set(), end.wait()))
    begun.wait()
    constraints = Constraints(BYTES, SIZE, threads, Now())
    admit(constraints, 0, AB)
    constraints.close()
    end.set()
    threads.shutdown()
    assert failure(constraints, 0) == "CancelledError: "


def test_a_text_is_healed_while_grammars_are_being_built() -> None:
    constraints = Constraints(BYTES, SIZE, LateThreads(), Now())
    admit(constraints, 0, AB)
    admit(constraints, 1, Healing(b"ab"))
    assert constraints.unbuilt() == [0] and allowed(constraints, 1) == [[97]]


def lexers_of(states: int, patch: pytest.MonkeyPatch, lasting: int = 1) -> None:
    """Matchers are to last for so many tokens."""
    patch.setattr(Constraints, "lasting", lasting)
    patch.setattr(llguidance, "LIMITS", LLParserLimits(max_lexer_states=states, verbose_errors=False))


def test_rows_go_on_behind_their_tokens_when_the_lexer_that_they_share_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For more tokens than two lexers have states for."""
    large, threads, chance = constraints_of(), Counting(), random.Random(1)
    small = Constraints(BYTES, SIZE, threads, Now())
    for row in range(3):
        admit(large, row, WIDE)
        assert allowed(large, row) == [[97, 98]]
    lexers_of(40, monkeypatch)
    for row in range(3):
        admit(small, row, WIDE)
    for _ in range(20):
        assert allowed(small, 0, 1, 2) == allowed(large, 0, 1, 2)
        for row in range(3):
            token = chance.choice([97, 98])
            small.take(row, token)
            large.take(row, token)
    assert threads.asked > 1 + 2
    admit(small, 3, WIDE)
    assert allowed(small, 3) == [[97, 98]], "who comes now is not concerned"


def test_a_row_draws_later_while_its_matcher_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, chance = LateThreads(), random.Random(1)
    constraints = Constraints(BYTES, SIZE, threads, Now())
    lexers_of(30, monkeypatch)
    admit(constraints, 0, WIDE)
    admit(constraints, 1, AllowedIds((5,)))
    complete(threads)
    lines = np.ones((2, constraints.words), np.int32)
    while not (filled := constraints.fill([0, 1], lines)).later:
        assert filled.failures == {}
        constraints.take(0, chance.choice([97, 98]))
    assert filled == ({}, [0]) and not lines[0].any() and lines[1].any()
    assert constraints.unbuilt() == [0]
    complete(threads)
    assert constraints.unbuilt() == [] and allowed(constraints, 0, 1) == [[97, 98, 99], [5]]


def test_a_row_that_no_lexer_has_room_for_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Counting()
    constraints = Constraints(BYTES, SIZE, threads, Now())
    lexers_of(20, monkeypatch)
    admit(constraints, 0, WIDE, output=[97, 98, 97, 97, 98, 98, 97])
    told = failure(constraints, 0)
    assert told == "the grammar of this request is too complex: lexer error: too many states: 20 >= 20"
    assert threads.asked == 1 + 3, "one that others may have filled, and one of its own"
    assert failure(constraints, 0) == told and threads.asked == 1 + 3


def test_a_matcher_that_lasts_for_a_few_tokens_is_not_built_again_for_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, chance = Counting(), random.Random(1)
    constraints = Constraints(BYTES, SIZE, threads, Now())
    lexers_of(40, monkeypatch, lasting=200)
    admit(constraints, 0, WIDE)
    lines = np.empty((1, constraints.words), np.int32)
    while not (filled := constraints.fill([0], lines)).failures:
        constraints.take(0, chance.choice([97, 98]))
    assert "too complex" in filled.failures[0].text and threads.asked == 1 + 3


def test_many_rows_of_a_grammar_are_spread_over_lexers_and_may_draw_what_they_might_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows come and go, and lexers are full now and then."""
    threads, spares, chance = LateThreads(), LateThreads(), random.Random(2)
    alone, many = constraints_of(), Constraints(BYTES, SIZE, threads, Now(), spares, side_by_side=2)
    admit(alone, 0, WIDE)
    assert allowed(alone, 0) == [[97, 98]]  # its lexer is built before those that are soon full
    lexers_of(120, monkeypatch)
    rows: list[int] = []
    drawn = waited = 0
    for step in range(400):
        if len(rows) < 40 and chance.random() < 0.5:
            rows.append(max(rows, default=0) + 1)
            for each in (alone, many):
                admit(each, rows[-1], WIDE)
        waiting = many.unbuilt()
        drawing = [row for row in rows if row not in waiting]
        lines = np.zeros((len(drawing), many.words), np.int32)
        filled = many.fill(drawing, lines)
        assert filled.failures == {}
        waited += len(waiting) + len(filled.later)
        for row, line in zip(drawing, lines, strict=True):
            if row in filled.later:
                continue
            (might,) = allowed(alone, row)
            assert ids_of(line) == might, step
            token = chance.choice([97, 98] if 97 in might and chance.random() < 0.97 else might)
            drawn += 1
            if token != EOS and chance.random() > 0.06:
                many.take(row, token)
                alone.take(row, token)
                continue
            rows.remove(row)
            for each in (alone, many):
                each.apply(Update(number=2, retire=pack([row])))
        for each in (threads, spares):
            if chance.random() < 0.7:
                each.complete()
    assert threads.begun > 10 and spares.begun > 8 and drawn > 2000 and waited


class Panic(BaseException):
    pass


@pytest.mark.parametrize("error", [Panic("in the lexer"), GrammarError("panicked")])
def test_what_panicked_is_built_anew_for_who_comes_next(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fails(matcher: object) -> None:
        raise error

    threads = Counting()
    constraints = Constraints(BYTES, SIZE, threads, Now())
    admit(constraints, 0, AB)
    with monkeypatch.context() as patch:
        patch.setattr("aiollm.workers.constraints._Row.matcher", property(fails))
        assert failure(constraints, 0) in ("Panic: in the lexer", "panicked")
    admit(constraints, 1, AB)
    assert allowed(constraints, 1) == [[97]] and threads.asked == 1 + 2


def test_a_grammar_is_built_once_and_the_oldest_ones_are_given_up() -> None:
    threads = Counting()
    constraints = Constraints(BYTES, SIZE, threads)
    for _ in range(3):
        for row in range(4):
            admit(constraints, row, Grammar("regex", f"a{row}"))
    assert threads.asked == 1 + 4, "the tokenizer's, and one for each grammar"
    for row in range(KEPT):
        admit(constraints, 5, Grammar("regex", f"b{row}"))
    admit(constraints, 0, Grammar("regex", "a0"))
    assert threads.asked == 1 + 4 + KEPT + 1


def written(constraints: Constraints, row: int, text: str) -> None:
    """The row draws the text, every token of which it may."""
    for byte in text.encode():
        assert byte in allowed(constraints, row)[0], (text, chr(byte))
        constraints.take(row, byte)


@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_binds_behind_the_thoughts(opened: bool) -> None:
    constraints = constraints_of()
    admit(constraints, 0, Grammar("regex", "ab?c", Thoughts(*TAGS, opened)))
    written(constraints, 0, ("" if opened else "<t>") + "so {</t")
    assert EOS not in allowed(constraints, 0)[0], "thoughts are closed first"
    written(constraints, 0, ">\n\nac")
    assert allowed(constraints, 0) == [[EOS]]
    admit(constraints, 1, Grammar("regex", "ab?c", Thoughts(*TAGS, False)))
    assert allowed(constraints, 1) == [[ord("<"), 97]]
    written(constraints, 1, "abc")
    assert allowed(constraints, 1) == [[EOS]]


def test_tags_that_are_special_tokens_are_no_text() -> None:
    names = [b"<|end|>", b"[T]", b"[/T]"]
    constraints = constraints_of(Vocabulary([*BYTES.pieces[:256], *names], [256, 257, 258], [EOS]))
    open, close = Tag("[T]", (257,), True), Tag("[/T]", (258,), True)
    thoughts = Thoughts(open, close, False)
    admit(constraints, 0, Grammar("regex", "ab?c", thoughts), ThoughtLimit(2, thoughts))
    assert allowed(constraints, 0) == [[97, 257]]
    constraints.take(0, 257)
    assert {258, 97} < set(allowed(constraints, 0)[0]) and not {EOS, 257} & set(allowed(constraints, 0)[0])
    written(constraints, 0, "[/")
    assert allowed(constraints, 0) == [[258]]
    constraints.take(0, 258)
    written(constraints, 0, "ac")


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("grammar", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_thoughts_are_closed_behind_so_many_tokens(opened: bool, grammar: bool, tokens: int) -> None:
    constraints, thoughts = constraints_of(), Thoughts(*TAGS, opened)
    own: list[Constraint] = [
        ThoughtLimit(tokens, thoughts),
        *([Grammar("regex", "(?s:.)*", thoughts)] if grammar else []),
    ]
    admit(constraints, 0, *own)
    written(constraints, 0, ("" if opened else "<t>") + "a<b/c"[:tokens])
    for byte in b"</t>":
        assert allowed(constraints, 0) == [[byte]]
        constraints.take(0, byte)
    assert len(allowed(constraints, 0)[0]) > 100
    written(constraints, 0, "<t> and on")


def test_thoughts_within_their_limit_and_answers_without_any_are_free() -> None:
    constraints, limit = constraints_of(), ThoughtLimit(7, Thoughts(*TAGS, False))
    admit(constraints, 0, limit)
    admit(constraints, 1, limit, output=list(b"\n<t>a</t>"))
    for text in ("<the answer", "is that <t> of many"):
        written(constraints, 0, text)
    written(constraints, 1, "<t> of many")
    admit(constraints, 2, limit, output=list(b"<t>1234567</"))
    assert allowed(constraints, 2) == [[ord("t")]], "as before a pause"


def test_a_character_that_is_begun_is_written_before_thoughts_are_closed() -> None:
    constraints, thoughts = constraints_of(), Thoughts(*TAGS, True)
    admit(constraints, 0, ThoughtLimit(1, thoughts), Grammar("regex", "a", thoughts))
    constraints.take(0, 0xC3)
    assert set(allowed(constraints, 0)[0]) == set(range(0x80, 0xC0))
    constraints.take(0, 0xA9)
    written(constraints, 0, "</t>a")


class Slow:
    """Grammars that are never built, until they may be."""

    def __init__(self, patch: pytest.MonkeyPatch, *grammars: Grammar) -> None:
        self.over = threading.Event()
        original = constraints_module.matcher_of

        def matcher_of(grammar: Grammar, *rest: Any) -> Any:
            assert grammar not in grammars or self.over.wait(SECONDS)
            return original(grammar, *rest)

        patch.setattr(constraints_module, "matcher_of", matcher_of)


def until(condition: Callable[[], bool]) -> None:
    """Looks again and again, as the loop does."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_grammar_that_takes_long_holds_back_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, WIDE)
    constraints = Constraints(BYTES, SIZE, healers=Now(), spares=Now())
    admit(constraints, 0, WIDE)
    admit(constraints, 1, AB)
    until(lambda: constraints.unbuilt() == [0])
    assert allowed(constraints, 1) == [[97]]
    slow.over.set()
    until(lambda: constraints.unbuilt() == [])
    assert allowed(constraints, 0) == [[97, 98]]


def test_rows_whose_grammar_is_not_built_in_time_fail_and_later_ones_too_until_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow(monkeypatch, WIDE)
    constraints = Constraints(BYTES, SIZE, Builders(2), Now(), Now(), watch=Watch(2, late=0.01))
    told = "the grammar of this request was not built within 0.01 s"
    admit(constraints, 0, WIDE)
    admit(constraints, 1, WIDE, AllowedIds((97,)))
    until(lambda: constraints.unbuilt() == [])
    assert failure(constraints, 0) == failure(constraints, 1) == told
    admit(constraints, 2, WIDE)
    admit(constraints, 3, AB)
    until(lambda: constraints.unbuilt() == [])
    assert failure(constraints, 2) == told and allowed(constraints, 3) == [[97]]
    slow.over.set()
    until(lambda: not constraints._watch.overdue(time.monotonic()))
    admit(constraints, 4, WIDE)
    assert constraints.unbuilt() == [] and allowed(constraints, 4) == [[97, 98]]


def test_where_no_thread_is_left_who_waits_for_one_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, WIDE)
    constraints = Constraints(BYTES, SIZE, Builders(1), Now(), Now(), watch=Watch(1, late=0.01))
    admit(constraints, 0, WIDE)
    until(lambda: constraints.unbuilt() == [])
    monkeypatch.setattr("aiollm.workers.building.TELLING", 0.0)
    constraints.unbuilt()
    admit(constraints, 1, AB)
    with pytest.raises(Stuck):
        until(lambda: constraints.unbuilt() == [])
    slow.over.set()
