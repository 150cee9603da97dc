"""Who follows which lexer, when one is built once more, and when it is given up."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from overlap import LateThreads

from aiollm.wire.sampling import Grammar
from aiollm.workers.lexers import KEPT, MOVED, Lexer, Lexers
from aiollm.workers.replay import Now

A, B = Grammar("regex", "a"), Grammar("regex", "b")
MOST = 4


@dataclass(eq=False)
class Row:
    grammar: Grammar
    lexer: Lexer
    tokens: list[int]


class Crowd:
    """Rows of some grammars, and what their lexers do for them."""

    def __init__(self, build: Any = lambda grammar: grammar.source) -> None:
        self.spares = LateThreads()
        self.lexers = Lexers(build, Now(), self.spares, MOST // 2)
        self.rows: list[Row] = []

    def come(self, grammar: Grammar, rows: int = 1, tokens: int = 0) -> None:
        self.rows += [Row(grammar, self.lexers.of(grammar), [0] * tokens) for _ in range(rows)]

    def go(self, rows: Sequence[Row]) -> None:
        gone = set(rows)
        self.rows = [row for row in self.rows if row not in gone]
        self.lexers.keep({row.lexer for row in self.rows})

    def spread(self) -> int:
        """How many rows moved."""
        moved = 0
        for row, lexer in self.lexers.spread(self.shared()):
            assert row.lexer is not lexer
            row.lexer = lexer
            moved += 1
        return moved

    def shared(self) -> dict[Lexer, list[Row]]:
        found: dict[Lexer, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.lexer, []).append(row)
        return found

    def sizes(self) -> list[int]:
        return sorted(map(len, self.shared().values()))

    def settle(self) -> None:
        """Until nothing is left to be built, and nobody moves."""
        while self.spread() or self.spares.queue:
            self.spares.complete()


def test_a_few_rows_share_one_lexer() -> None:
    crowd = Crowd()
    crowd.come(A, Lexers.each)
    crowd.come(B, Lexers.each)
    crowd.settle()
    assert crowd.sizes() == [Lexers.each] * 2 and not crowd.spares.begun


def test_a_crowd_is_spread_evenly_over_as_many_as_it_may_have() -> None:
    crowd = Crowd()
    crowd.come(A, 2 * Lexers.each + 1)
    crowd.come(B, 10 * Lexers.each)
    crowd.settle()
    assert crowd.sizes() == [5, 6, 6, *[10 * Lexers.each // MOST] * MOST]
    assert crowd.spares.begun == 2 + MOST - 1


def test_nobody_waits_for_what_is_built_once_more() -> None:
    crowd = Crowd()
    crowd.come(A, 20)
    assert crowd.spread() == 0 and len(crowd.spares.queue) == 2
    assert crowd.spread() == 0 and len(crowd.spares.queue) == 2, "nor is it asked for again"
    crowd.spares.complete()
    assert crowd.spread() == 10 and crowd.sizes() == [10, 10]
    crowd.come(A, 4)
    assert crowd.sizes() == [10, 14], "who comes begins with the first"


def test_who_has_to_read_least_moves_first_and_a_step_moves_only_so_much() -> None:
    crowd = Crowd()
    crowd.come(A, 10, MOVED)
    crowd.come(A, 10, 5)
    crowd.spread()
    while crowd.spares.queue:
        crowd.spares.complete()
    first = crowd.lexers.of(A)
    assert crowd.spread() == 10 + 1 and [len(row.tokens) for row in crowd.shared()[first]] == [MOVED] * 9
    assert [crowd.spread() for _ in range(3)] == [1, 1, 0] and crowd.sizes() == [6, 7, 7]


def test_moves_of_long_rows_take_several_steps() -> None:
    crowd = Crowd()
    crowd.come(A, 16, MOVED + 1)
    crowd.spread()
    crowd.spares.complete()
    assert [crowd.spread() for _ in range(9)] == [1] * 8 + [0]


def test_spares_outlive_those_who_come_and_go_and_are_given_up_when_nobody_is_left() -> None:
    crowd = Crowd()
    crowd.come(A, 20)
    crowd.come(B)
    crowd.spread()
    while crowd.spares.queue:
        crowd.spares.complete()
        crowd.go(crowd.rows[-1:])  # they are not followed yet
        crowd.come(B)
    crowd.settle()
    first = crowd.lexers.of(A)
    assert crowd.sizes()[-3:] == [6, 7, 7] and crowd.spares.begun == 2
    crowd.go([row for row in crowd.rows if row.lexer is not first])
    crowd.come(A, 20 - len(crowd.rows))
    crowd.settle()
    assert crowd.sizes() == [6, 7, 7] and crowd.spares.begun == 2
    crowd.go(list(crowd.rows))
    crowd.come(A, 20)
    assert crowd.lexers.of(A) is first and crowd.sizes() == [20]
    crowd.settle()
    assert crowd.spares.begun == 4


def test_spares_for_nobody_are_not_begun() -> None:
    crowd = Crowd()
    crowd.come(A, 20)
    crowd.spread()
    crowd.go(list(crowd.rows))
    crowd.settle()
    assert not crowd.spares.begun


def test_where_one_is_full_all_are_forgotten_and_their_rows_go_on() -> None:
    crowd = Crowd()
    crowd.come(A, 20)
    crowd.spread()
    crowd.spares.complete()
    crowd.spread()
    old = set(crowd.shared())
    assert len(old) == 2
    crowd.lexers.forget(crowd.rows[-1].lexer)
    new = crowd.lexers.of(A)
    assert new not in old and new.done(), "nobody waits for a spare"
    crowd.lexers.forget(crowd.rows[0].lexer)
    assert crowd.lexers.of(A) is new, "it is not one of them"
    crowd.settle()
    assert set(crowd.shared()) == old and crowd.spares.begun == 1, "what was asked for once more is not built"


def test_what_cannot_be_built_once_more_is_told_and_its_rows_share_what_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = 0

    def build(grammar: Grammar) -> str:
        nonlocal built
        built += 1
        if built == 3:
            raise MemoryError("no more")
        return grammar.source

    crowd = Crowd(build)
    crowd.come(A, 20)
    crowd.come(B)
    for _ in range(5):
        crowd.settle()
        crowd.go(crowd.rows[-1:])
        crowd.come(B)
    assert crowd.sizes() == [1, 10, 10] and caplog.text.count("no more") == 1
    assert built == 2 + 2, "nobody tries again for them"


def test_one_that_is_alone_is_nobody_elses() -> None:
    crowd = Crowd()
    crowd.come(A, 20)
    own = crowd.lexers.alone(A)
    crowd.rows[0].lexer = own
    crowd.settle()
    assert [row.lexer for row in crowd.rows].count(own) == 1


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes_rows_follow_their_own_grammar_and_nothing_is_left_behind(seed: int) -> None:
    chance = random.Random(seed)
    grammars = [Grammar("regex", str(at)) for at in range(KEPT + 8)]
    crowd = Crowd()
    for _ in range(400):
        match chance.randrange(6):
            case 0 | 1:
                crowd.come(chance.choice(grammars[: chance.choice([2, len(grammars)])]), chance.randrange(12))
            case 2:
                crowd.go(chance.sample(crowd.rows, chance.randrange(len(crowd.rows) + 1)))
            case 3:
                crowd.spread()
            case 4:
                crowd.spares.complete()
            case 5 if crowd.rows:
                crowd.lexers.forget(chance.choice(crowd.rows).lexer)
        assert all(row.lexer.result() == row.grammar.source for row in crowd.rows if row.lexer.done())
    crowd.go(crowd.rows)
    while crowd.spares.queue:
        crowd.spares.complete()
    kept = crowd.lexers._grammars.values()
    assert all(len(family.lexers) == 1 for family in kept) and len(kept) <= KEPT
    assert crowd.lexers._families.keys() == {family.lexers[0] for family in kept}
