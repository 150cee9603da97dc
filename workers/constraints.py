"""What constrained rows may draw next, as masks of a step (rule J).

A row's `constraints` become matchers when it is admitted: one that follows the grammar, built beside the loop, and
filters. They know the generated tokens as the host does: those of the admission, which after a pause are some, and
those that were posted since. Where the lexer that a matcher shares with others is full, each of them goes on behind its
known tokens with a matcher that is built anew; where too many share it, some go on with another one.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from aiollm.grammar.llguidance import GrammarError, LexerError, check, matcher_of, tokenizer_of
from aiollm.wire.columns import ints
from aiollm.wire.messages import Admit, Reason, Update
from aiollm.wire.sampling import Grammar, Healing, SamplingParams, ThoughtLimit
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers.building import Builders, Watch
from aiollm.workers.filters import Filter, Words, behind, clear, filter_of
from aiollm.workers.healing import Following, Pieces, healing
from aiollm.workers.lexers import Lexer, Lexers
from aiollm.workers.thoughts import Limit

log = logging.getLogger(__name__)


class NoToken(GrammarError):
    """The constraints of a request contradict each other, or lead to where none of them can be met."""


class Filled(NamedTuple):
    """What came of masks. The lines of the rows named here are 0."""

    failures: dict[int, Reason]
    """What went wrong, by row."""
    later: list[int]
    """Rows that can draw once their matchers are built again."""


class Constraints:
    """The constrained rows of a worker that draws; with several ranks that is rank 0."""

    lasting = 64
    """Tokens for which a matcher must last: one that is built again holds up others, for half a second at worst."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        size: int,
        threads: Executor | None = None,
        healers: Executor | None = None,
        spares: Executor | None = None,
        side_by_side: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`size` is the model's number of ids; without a vocabulary no grammar can be followed. Grammars, which may
        take seconds each, are built by `threads`, over which there is a `watch`; texts are healed by `healers`. So many
        masks are computed `side_by_side` (four of five cores); for that, grammars are built once more by `spares`."""
        self.words = -(-size // 32)
        self._size = size
        self._rows: dict[int, _Row] = {}
        self._threads = threads or Builders()
        self._healers = healers or ThreadPoolExecutor(1, "healing")
        self._spares = spares or Builders(1)
        self._watch = watch or Watch()
        self._side_by_side = side_by_side or max(1, len(os.sched_getaffinity(0)) * 4 // 5)
        self._executor: LLExecutor | None = None
        self._vocabulary = vocabulary
        self._tokenizer = self._threads.submit(_tokenizer, vocabulary, size)
        self._lexers = Lexers(self._built, self._threads, self._spares, self._side_by_side)
        self._pieces: Future[Pieces] | None = None

    def unbuilt(self) -> list[int]:
        """Rows of which something is still being built. Those that wait for what does not come back will fail when they
        draw. Raises Stuck where nothing can be built any more."""
        now = time.monotonic()
        late = self._watch.overdue(now)
        waiting = [(index, row) for index, row in self._rows.items() if row.building and row.waits]
        for index, row in waiting if late else ():
            if row.compiled in late:
                log.error("row %d fails: its grammar was not built within %g s", index, self._watch.late)
                row.give_up(f"the grammar of this request was not built within {self._watch.late:g} s")
        waiting = [(index, row) for index, row in waiting if row.waits]
        if waiting:
            self._watch.check(now)
        return [index for index, _ in waiting]

    def apply(self, update: Update) -> None:
        """Take an update's part of it: who is constrained, and which tokens are known."""
        retired = [self._rows.pop(row, None) for row in ints(update.retire).tolist()] if self._rows else []
        self._drop([part for row in retired if row is not None and row.waits for part in row.building])
        if retired:
            self._lexers.keep({row.compiled for row in self._rows.values() if row.compiled is not None})
        for admit in update.admit:
            if admit.sampling.constraints:
                self._rows[admit.row] = self._admitted(admit)
        if self._rows and update.tokens:
            values, at = ints(update.tokens.values), 0
            columns = (update.tokens.rows, update.tokens.starts, update.tokens.counts)
            for index, start, count in zip(*(ints(column).tolist() for column in columns), strict=True):
                if (row := self._rows.get(index)) is not None:
                    row.tokens += values[at + max(0, row.prompt - start) : at + count].tolist()
                at += count

    def take(self, row: int, token: int) -> None:
        """A constrained row has drawn a token that did not end it."""
        self._rows[row].tokens.append(token)

    def fill(self, rows: Sequence[int], lines: Words) -> Filled:
        """Write who may draw what into lines [n, words], one for each row."""
        filled, left = Filled({}, []), dict(enumerate(rows))
        self._spread()
        while left:
            full = self._narrow(left, lines, filled.failures)
            left = {}
            for at, error in full.items():
                if not self._renew(self._rows[rows[at]]):
                    text = f"the grammar of this request is too complex: {error}"
                    filled.failures[rows[at]] = Reason(text, asked=True)
                elif self._rows[rows[at]].waits:
                    filled.later.append(rows[at])
                else:
                    left[at] = rows[at]
        without = filled.failures.keys() | set(filled.later)
        for at, row in enumerate(rows):
            if row in without:
                lines[at] = 0
        return filled

    def _narrow(self, rows: dict[int, int], lines: Words, failures: dict[int, Reason]) -> dict[int, str]:
        """Take out of lines, which are given with their rows, what may not be drawn; those whose lexer has failed.

        What concerns all rows is one call each. For 256 the loop itself computes 2.5 ms so, and 5.9 row by row (on a
        slow core, with 49,152 tokens), beside the 12 that the masks take two cores.
        """
        full: dict[int, str] = {}
        guided: dict[int, list[tuple[LLMatcher, int]]] = {}
        """By lexer, as are `last`: threads take neighbours, and those that share a lexer would wait for each other."""
        last: dict[int, list[tuple[LLMatcher, int]]] = {}

        def attempt(act: Callable[[int, _Row], None], places: Iterable[int]) -> None:
            for at in places:
                row = rows[at]
                if row in failures or at in full:
                    continue
                try:
                    act(at, self._rows[row])
                except LexerError as error:
                    full[at] = str(error)
                except NoToken as error:
                    failures[row] = Reason(str(error), asked=True)
                except BaseException as error:  # a panic in Rust is no Exception, or the text of an error
                    failures[row] = Reason(str(error))
                    if not isinstance(error, GrammarError):
                        log.exception("the constraints of a row failed")
                        failures[row] = Reason(f"{type(error).__name__}: {error}")
                    if (own := self._rows.get(row)) is not None and own.compiled is not None:
                        self._lexers.forget(own.compiled)  # nobody knows in what state it is

        def advance(at: int, row: _Row) -> None:
            if (matcher := row.matcher) is None:
                lines[at] = -1
                return
            guided.setdefault(id(row.compiled), []).append((matcher, at))
            if new := row.untaken():
                if len(new) > 1:
                    matcher.consume_tokens(new[:-1])
                last.setdefault(id(row.compiled), []).append((matcher, new[-1]))

        def refuse(at: int, row: _Row) -> None:
            raise NoToken("the constraints of this request allow no token here")

        def fail(matchers: Sequence[tuple[LLMatcher, int]]) -> None:
            attempt(_checked, [at for matcher, at in matchers if matcher.is_error()])

        attempt(advance, rows)
        if guided:
            self._executor = self._executor or LLExecutor(self._side_by_side)
            matchers = [each for group in guided.values() for each in group]
            if last:
                self._executor.consume_token_par([each for group in last.values() for each in group])
            fail(matchers)
            matchers = [each for each in matchers if not each[0].is_error()]
            if matchers:
                self._executor.unsafe_compute_mask_ptr(matchers, lines.ctypes.data, 4 * self.words, len(lines))
            fail(matchers)
        narrowing = [at for at, row in rows.items() if row not in failures and self._rows[row].narrows]
        attempt(lambda at, row: row.narrow(lines[at]), narrowing)
        attempt(refuse, [at for at in np.flatnonzero(~lines.any(axis=1)).tolist() if at in rows])
        return full

    def _admitted(self, admit: Admit) -> "_Row":
        constraints = admit.sampling.constraints
        grammar = next((each for each in constraints if isinstance(each, Grammar)), None)
        compiled = None if grammar is None else self._watched(self._lexers.of(grammar))
        healed = [self._healing(each.text) for each in constraints if isinstance(each, Healing)]
        others = [each for each in constraints if not isinstance(each, Grammar | Healing | ThoughtLimit)]
        filters = [filter_of(each, self.words) for each in others] + [behind(each, self.words) for each in healed]
        pieces = self._vocabulary.pieces if self._vocabulary is not None else ()
        filters += [Limit(each, pieces) for each in constraints if isinstance(each, ThoughtLimit)]
        return _Row(admit.prompt_length, admit.sampling, grammar, compiled, filters, healed)

    def _watched(self, lexer: Lexer) -> Lexer:
        self._watch.add(lexer)
        return lexer

    def _built(self, grammar: Grammar) -> LLMatcher:
        return matcher_of(grammar, self._tokenizer.result())

    def _spread(self) -> None:
        """Have rows follow other lexers where too many share one."""
        crowds: dict[Lexer, list[_Row]] = {}
        for row in self._rows.values():
            if row.compiled is not None:
                crowds.setdefault(row.compiled, []).append(row)
        for row, lexer in self._lexers.spread(crowds):
            row.follow(lexer)

    def _renew(self, row: "_Row") -> bool:
        """Have the matcher of a row built again, and not from what has failed. Where the new one fails soon, others may
        have filled it: the next is the row's alone. False where that one has failed soon too."""
        assert row.grammar is not None and row.compiled is not None
        self._lexers.forget(row.compiled)
        soon = row.renewed is not None and len(row.tokens) - row.renewed < self.lasting
        if soon and row.alone:
            return False
        row.renew(self._watched(self._lexers.alone(row.grammar) if soon else self._lexers.of(row.grammar)), soon)
        return True

    def _drop(self, parts: "Sequence[Future[Any]]") -> None:
        """Of these, which were to be built for rows that are gone, what no other waits for is not begun."""
        wanted = {part for row in self._rows.values() for part in row.building} if parts else set()
        for part in parts:
            if part not in wanted and part.cancel():
                self._lexers.forget(part)

    def close(self) -> None:
        """Begin nothing that has not begun: a process ends when all that it began has ended."""
        for threads in (self._threads, self._healers, self._spares):
            threads.shutdown(wait=False, cancel_futures=True)

    def _healing(self, text: bytes) -> "Future[Following]":
        if self._pieces is None:
            self._pieces = self._healers.submit(_pieces, self._vocabulary, self._size)
        pieces = self._pieces
        return self._healers.submit(lambda: healing(text, pieces.result()))


class _Row:
    """`tokens` are the generated ones; the first `taken` of them are known to the matcher, a copy of what is compiled.
    `renewed` is how many they were when it was last built again, `alone` whether for nobody else. The row waits for
    what is `building`."""

    __slots__ = (
        "prompt", "tokens", "_sampling", "grammar", "compiled", "renewed", "alone", "building", "_matcher", "_taken",
        "_filters",
    )  # fmt: skip

    def __init__(
        self,
        prompt: int,
        sampling: SamplingParams,
        grammar: Grammar | None,
        compiled: Lexer | None,
        filters: list[Filter],
        healed: "list[Future[Following]]",
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self._sampling = sampling
        self.grammar = grammar
        self.compiled = compiled
        self.renewed: int | None = None
        self.alone = False
        self._matcher: LLMatcher | None = None
        self._taken = 0
        self._filters = filters
        self.building: list[Future[Any]] = [*healed, *([] if compiled is None else [compiled])]

    @property
    def waits(self) -> bool:
        self.building = [part for part in self.building if not part.done()]
        return bool(self.building)

    def renew(self, compiled: Lexer, alone: bool) -> None:
        """Follow the grammar with what is built anew."""
        self.follow(compiled)
        self.building = [*self.building, compiled]
        self.renewed, self.alone = len(self.tokens), alone

    def give_up(self, reason: str) -> None:
        """Fail when a token is to be drawn, and wait for nothing until then."""
        failed: Lexer = Future()
        failed.set_exception(GrammarError(reason))
        self.follow(failed)
        self.building = []

    def follow(self, compiled: Lexer) -> None:
        """Follow the grammar from the first token on again, with what is compiled here."""
        self.compiled, self._matcher, self._taken = compiled, None, 0

    @property
    def matcher(self) -> LLMatcher | None:
        """That of the row's grammar, behind the tokens that it has taken. Raises what building it raised."""
        if self._matcher is None and self.compiled is not None:
            self._matcher = self.compiled.result().deep_copy()
        return self._matcher

    def untaken(self) -> list[int]:
        """The tokens that the matcher is to take now."""
        new = self.tokens[self._taken :]
        self._taken = len(self.tokens)
        return new

    @property
    def narrows(self) -> bool:
        """Whether more may not come than its grammar says."""
        return bool(self._filters) or len(self.tokens) < self._sampling.min_tokens

    def narrow(self, line: Words) -> None:
        """Clear that, in a line as the grammar has it.

        A grammar may end before min_tokens: then it has nothing else to say.
        """
        for filter in self._filters:
            filter(self.tokens, line)
        if len(self.tokens) < self._sampling.min_tokens:
            whole = line.copy()
            clear(line, self._sampling.stop_ids)
            if not line.any() and self.grammar is not None:
                line[:] = whole


def _checked(at: int, row: _Row) -> None:
    assert row.matcher is not None
    check(row.matcher)


def _tokenizer(vocabulary: Vocabulary | None, size: int) -> LLTokenizer:
    return tokenizer_of(_known(vocabulary), size)


def _pieces(vocabulary: Vocabulary | None, size: int) -> Pieces:
    return Pieces(_known(vocabulary), size)


def _known(vocabulary: Vocabulary | None) -> Vocabulary:
    if vocabulary is None:
        raise GrammarError("the tokens of this model have no text of their own")
    return vocabulary
