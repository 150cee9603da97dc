"""Grammars as matchers that rows copy.

Copies of a matcher share its lexer, and only one of them at a time computes a mask with it. So where many rows follow
one grammar, it is built several times, and the rows are spread over what came of it. The masks of 256 rows of one
schema took 42 ms with one lexer and 12 threads, 10.6 with 12 lexers and 7.6 with 32 (on 16 cores, with 151,643 real
tokens).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, Future
from typing import NamedTuple, Protocol, TypeVar

from llguidance import LLMatcher

from aiollm.wire.sampling import Grammar

log = logging.getLogger(__name__)

KEPT = 64  # grammars; a lexer takes up to some 100 MB, mostly a thousandth of that
MOST = 32  # lexers of one grammar: those of 256 rows
MOVED = 2000  # tokens that the rows which move in one step may have: a lexer reads some hundred in 1 ms at worst

Lexer = Future[LLMatcher]
"""A matcher before its first token, once it is built."""


class Follower(Protocol):
    """A row with so many tokens to read again where it follows another lexer."""

    tokens: list[int]


Row = TypeVar("Row", bound=Follower)


class _Family(NamedTuple):
    """The first of `lexers` is what rows begin with, the others are spares."""

    grammar: Grammar
    lexers: list[Lexer]


class Lexers:
    """`build` may take seconds, in `threads`; spares are built in `spares`, and nobody waits for them. As many lexers
    of a grammar are used as masks are computed `side_by_side`, twice over, so that few of these meet at one."""

    each = 8
    """Rows that may share a lexer before there is another one."""

    def __init__(
        self, build: Callable[[Grammar], LLMatcher], threads: Executor, spares: Executor, side_by_side: int
    ) -> None:
        self._build, self._threads, self._spares = build, threads, spares
        self._most = min(MOST, 2 * side_by_side) if side_by_side > 1 else 1
        self._grammars: OrderedDict[Grammar, _Family] = OrderedDict()
        self._families: dict[Lexer, _Family] = {}

    def of(self, grammar: Grammar) -> Lexer:
        """The one that rows begin with. Of many grammars, those that were asked for last are kept."""
        family = self._grammars.pop(grammar, None)
        if family is None:
            family = _Family(grammar, [])
            self._add(family, self.alone(grammar))
        self._grammars[grammar] = family
        if len(self._grammars) > KEPT:
            self.forget(next(iter(self._grammars.values())).lexers[0])
        return family.lexers[0]

    def alone(self, grammar: Grammar) -> Lexer:
        """One that nobody else will get."""
        return self._threads.submit(self._build, grammar)

    def forget(self, lexer: Lexer) -> None:
        """Have its grammar built anew for whoever comes next: if this one is full, its spares soon will be. Rows that
        follow any of them go on."""
        if (family := self._families.get(lexer)) is not None:
            self._cut(family, 0)
            del self._grammars[family.grammar]

    def keep(self, used: AbstractSet[Lexer]) -> None:
        """Rows have gone, and these lexers are followed: give up the spares of grammars that no row follows now."""
        for family in self._grammars.values():
            if len(family.lexers) > 1 and used.isdisjoint(family.lexers):
                self._cut(family, 1)

    def spread(self, crowds: Mapping[Lexer, Sequence[Row]]) -> Iterator[tuple[Row, Lexer]]:
        """Rows by their lexers: who is to follow which one from now on, as too many share theirs."""
        families = {id(family): family for lexer in crowds if (family := self._families.get(lexer)) is not None}
        for family in families.values() if self._most > 1 else ():
            crowd = sum(len(crowds.get(lexer, ())) for lexer in family.lexers)
            built = [each for each in family.lexers if each.done() and not each.exception()]
            if crowd <= self.each or not built:
                continue
            for _ in range(min(self._most, -(-crowd // self.each)) - len(family.lexers)):
                self._add(family, self._spares.submit(self._build, family.grammar))
                family.lexers[-1].add_done_callback(_tell)
            share = -(-crowd // len(built))
            room = [each for each in built for _ in range(share - len(crowds.get(each, ())))]
            moving = [row for each in built for row in _longest_first(crowds.get(each, ()))[share:]]
            read = 0
            for row, lexer in zip(reversed(_longest_first(moving)), room, strict=False):
                yield row, lexer
                read += len(row.tokens)
                if read >= MOVED:
                    break

    def _add(self, family: _Family, lexer: Lexer) -> None:
        family.lexers.append(lexer)
        self._families[lexer] = family

    def _cut(self, family: _Family, first: int) -> None:
        """Give up its lexers from number `first` on; spares that were not begun are not built."""
        for lexer in family.lexers[first:]:
            del self._families[lexer]
        for spare in family.lexers[max(first, 1) :]:
            spare.cancel()
        del family.lexers[first:]


def _longest_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -len(row.tokens))


def _tell(lexer: Lexer) -> None:
    if not lexer.cancelled() and (error := lexer.exception()) is not None:
        log.warning("a grammar could not be built once more, its rows share what there is: %s", error)
