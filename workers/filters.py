"""Constraints that need no grammar: each looks at the generated tokens, and takes ids out of a row's line of a mask."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from aiollm.wire.sampling import AllowedIds, BannedWords, Constraint, FirstIds
from aiollm.workers.healing import Following, Ids

Words = NDArray[np.int32]
"""Lines of bits, one for each id."""
Filter = Callable[[Sequence[int], Words], None]
"""Clears the bits of a line of ids that may not follow the generated ones."""


def filter_of(constraint: Constraint, words: int) -> Filter:
    """That of a constraint which names ids, for lines of so many words."""
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


def behind(following: "Future[Following]", words: int) -> Filter:
    """Nothing but what goes on with a cut text, until all of that is written."""

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
        clear(line, [last for *before, last in sequences if known[max(0, len(known) - len(before)) :] == before])

    return narrow


def clear(line: Words, ids: Sequence[int]) -> None:
    """Take ids out of a line."""
    for id in ids:
        if id >= 32 * len(line):  # tokenizers may have ids that the model has not
            continue
        line.view(np.uint32)[id // 32] &= ~np.uint32(1 << (id % 32))
