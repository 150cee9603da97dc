"""What constrained rows may draw next, as masks of a step (rule J).

A row's `constraints` become matchers when it is admitted: one that follows the grammar, built beside the loop, and
filters. They know the generated tokens as the host does: those of the admission, which after a pause are some, and
those that were posted since.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from aiollm.grammar.llguidance import GrammarError, check, matcher_of, tokenizer_of
from aiollm.wire.columns import ints
from aiollm.wire.messages import Admit, Update
from aiollm.wire.sampling import (
    AllowedIds,
    BannedWords,
    Constraint,
    FirstIds,
    Grammar,
    Healing,
    SamplingParams,
    ThoughtLimit,
)
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers.healing import Following, Ids, Pieces, healing
from aiollm.workers.thoughts import Limit

log = logging.getLogger(__name__)

COMPILED = 64  # grammars that are kept; one takes up to some 100 MB, mostly a thousandth of that
Words = NDArray[np.int32]
Filter = Callable[[Sequence[int], Words], None]
"""Clears the bits of a line of ids that may not follow the generated ones."""


class Constraints:
    """The constrained rows of a worker that draws; with several ranks that is rank 0."""

    def __init__(self, vocabulary: Vocabulary | None, size: int, threads: Executor | None = None) -> None:
        """`size` is the model's number of ids; without a vocabulary no grammar can be followed. What takes long is done
        by `threads`."""
        self.words = -(-size // 32)
        self._size = size
        self._rows: dict[int, _Row] = {}
        self._threads = threads or ThreadPoolExecutor(1, "grammars")
        self._executor: LLExecutor | None = None
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._vocabulary = vocabulary
        self._tokenizer = self._threads.submit(_tokenizer, vocabulary, size)
        self._pieces: Future[Pieces] | None = None

    def unbuilt(self) -> list[int]:
        """Rows of which something is still being built."""
        return [index for index, row in self._rows.items() if row.waits]

    def apply(self, update: Update) -> None:
        """Take an update's part of it: who is constrained, and which tokens are known."""
        for row in ints(update.retire).tolist() if self._rows else ():
            self._rows.pop(row, None)
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

    def fill(self, rows: Sequence[int], lines: Words) -> dict[int, str]:
        """Write who may draw what into lines [n, words], one for each row; what went wrong by row, whose line is 0."""
        lines.fill(-1)
        failures: dict[int, str] = {}
        guided: list[tuple[LLMatcher, int]] = []

        def attempt(act: Callable[[int, _Row], None]) -> None:
            for at, row in enumerate(rows):
                if row in failures:
                    continue
                try:
                    act(at, self._rows[row])
                except GrammarError as error:
                    failures[row] = str(error)
                    self._forget(self._rows[row])
                except BaseException as error:  # a panic in Rust is no Exception
                    log.exception("the constraints of a row failed")
                    failures[row] = f"{type(error).__name__}: {error}"

        def advance(at: int, row: _Row) -> None:
            if (matcher := row.advanced()) is not None:
                guided.append((matcher, at))

        attempt(advance)
        if guided:
            self._executor = self._executor or LLExecutor()
            self._executor.unsafe_compute_mask_ptr(guided, lines.ctypes.data, 4 * self.words, len(lines))
        attempt(lambda at, row: row.narrow(lines[at]))
        for at, row in enumerate(rows):
            if row in failures:
                lines[at] = 0
        return failures

    def _admitted(self, admit: Admit) -> "_Row":
        constraints = admit.sampling.constraints
        grammar = next((self._matcher(each) for each in constraints if isinstance(each, Grammar)), None)
        healed = [self._healing(each.text) for each in constraints if isinstance(each, Healing)]
        others = [each for each in constraints if not isinstance(each, Grammar | Healing | ThoughtLimit)]
        filters = [_filter(each, self.words) for each in others] + [_healed(each, self.words) for each in healed]
        pieces = self._vocabulary.pieces if self._vocabulary is not None else ()
        filters += [Limit(each, pieces) for each in constraints if isinstance(each, ThoughtLimit)]
        return _Row(admit.prompt_length, admit.sampling, grammar, filters, healed)

    def _matcher(self, grammar: Grammar) -> "Future[LLMatcher]":
        """One that is copied for each row."""
        found = self._compiled.pop(grammar, None)
        if found is None:
            found = self._threads.submit(lambda: matcher_of(grammar, self._tokenizer.result()))
        self._compiled[grammar] = found
        if len(self._compiled) > COMPILED:
            self._compiled.popitem(last=False)
        return found

    def _forget(self, row: "_Row") -> None:
        """Matchers of a grammar share its lexer: one that is full fails for all who come."""
        for grammar in [each for each, compiled in self._compiled.items() if compiled is row.grammar]:
            del self._compiled[grammar]

    def _healing(self, text: bytes) -> "Future[Following]":
        if self._pieces is None:
            self._pieces = self._threads.submit(_pieces, self._vocabulary, self._size)
        pieces = self._pieces
        return self._threads.submit(lambda: healing(text, pieces.result()))


class _Row:
    """`tokens` are the generated ones; the first `taken` of them are known to the matcher."""

    __slots__ = ("prompt", "tokens", "_sampling", "grammar", "_matcher", "_taken", "_filters", "_built")

    def __init__(
        self,
        prompt: int,
        sampling: SamplingParams,
        grammar: "Future[LLMatcher] | None",
        filters: list[Filter],
        healed: "list[Future[Following]]",
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self._sampling = sampling
        self.grammar = grammar
        self._matcher: LLMatcher | None = None
        self._taken = 0
        self._filters = filters
        self._built: list[Future[Any]] = [*healed, *([] if grammar is None else [grammar])]

    @property
    def waits(self) -> bool:
        return not all(part.done() for part in self._built)

    def advanced(self) -> LLMatcher | None:
        """The matcher of the row's grammar, behind all tokens; waits for it to be built. Raises GrammarError."""
        if self.grammar is None:
            return None
        if self._matcher is None:
            self._matcher = self.grammar.result().deep_copy()
        if self._taken < len(self.tokens):
            self._matcher.consume_tokens(self.tokens[self._taken :])
            self._taken = len(self.tokens)
        check(self._matcher)
        return self._matcher

    def narrow(self, line: Words) -> None:
        """Clear what else may not come, in a line as the grammar has it. Raises GrammarError where nothing is left."""
        if self._matcher is not None:
            check(self._matcher)
        for filter in self._filters:
            filter(self.tokens, line)
        if len(self.tokens) < self._sampling.min_tokens:
            whole = line.copy()
            _clear(line, self._sampling.stop_ids)
            if not line.any():
                line[:] = whole
        if not line.any():
            raise GrammarError("the constraints of this request allow no token here")


def _tokenizer(vocabulary: Vocabulary | None, size: int) -> LLTokenizer:
    return tokenizer_of(_known(vocabulary), size)


def _pieces(vocabulary: Vocabulary | None, size: int) -> Pieces:
    return Pieces(_known(vocabulary), size)


def _known(vocabulary: Vocabulary | None) -> Vocabulary:
    if vocabulary is None:
        raise GrammarError("the tokens of this model have no text of their own")
    return vocabulary


def _filter(constraint: Constraint, words: int) -> Filter:
    match constraint:
        case AllowedIds(ids):
            return _allowed(ids, words)
        case BannedWords(sequences):
            return _banned(sequences)
        case FirstIds(ids):
            return _first(ids, words)
    raise TypeError(f"{constraint} is no filter")


def _allowed(ids: Sequence[int], words: int) -> Filter:
    allowed = _line(ids, words)

    def narrow(tokens: Sequence[int], line: Words) -> None:
        line &= allowed

    return narrow


def _first(ids: Sequence[int], words: int) -> Filter:
    allowed = _line(ids, words)

    def narrow(tokens: Sequence[int], line: Words) -> None:
        if not tokens:
            line &= allowed

    return narrow


def _healed(following: "Future[Following]", words: int) -> Filter:
    def narrow(tokens: Sequence[int], line: Words) -> None:
        if (ids := following.result()(tokens)) is not None:
            line &= _line(ids, words)

    return narrow


def _line(ids: Sequence[int] | Ids, words: int) -> Words:
    """That has the bits of these ids set."""
    bits = np.zeros(32 * words, bool)
    bits[np.asarray(ids, np.int64)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _banned(sequences: Sequence[tuple[int, ...]]) -> Filter:
    longest = max(map(len, sequences))

    def narrow(tokens: Sequence[int], line: Words) -> None:
        known = list(tokens[-longest:])
        _clear(line, [last for *before, last in sequences if known[max(0, len(known) - len(before)) :] == before])

    return narrow


def _clear(line: Words, ids: Sequence[int]) -> None:
    for id in ids:
        if id >= 32 * len(line):  # tokenizers may have ids that the model has not
            continue
        line.view(np.uint32)[id // 32] &= ~np.uint32(1 << (id % 32))
