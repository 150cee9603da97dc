"""Token healing: which tokens may stand where a text was cut off the end of a prompt."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from aiollm.wire.vocabulary import Vocabulary

Ids = NDArray[np.int64]
Following = Callable[[Sequence[int]], Ids | None]
"""Generated ids -> the ids that may come next; None: any may."""


class Pieces:
    """Tokens in the order of their bytes, without special ones and those that have none. Takes about 1 us an id."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        """`size` is the model's number of ids."""
        special = frozenset(vocabulary.special)
        pairs = sorted((p, id) for id, p in enumerate(vocabulary.pieces[:size]) if p and id not in special)
        self.lengths = [*map(len, vocabulary.pieces), *[0] * (size - len(vocabulary.pieces))]
        self._pieces = [piece for piece, _ in pairs]
        self._ids = np.array([id for _, id in pairs], np.int64)
        self._beyond = b"\xff" * max(map(len, self._pieces), default=0)

    def parts(self, text: bytes) -> Iterator[tuple[int, Ids]]:
        """The tokens that are the beginning of this text, but not all of it, by their length."""
        low, high = 0, len(self._pieces)
        for length in range(1, len(text)):
            part = text[:length]
            low, high = (
                bisect_left(self._pieces, part, low, high),
                bisect_right(self._pieces, part + self._beyond, low, high),
            )
            if low == high:
                return
            yield length, self._ids[low : bisect_right(self._pieces, part, low, high)]

    def beginning(self, text: bytes) -> Ids:
        """The tokens that begin with this text."""
        return self._ids[bisect_left(self._pieces, text) : bisect_right(self._pieces, text + self._beyond)]


def healing(text: bytes, pieces: Pieces) -> Following:
    """What is generated begins with `text`.

    A token is some of what is missing, or all of it and more; none is taken that the rest cannot follow.
    """
    end = len(text)
    allowed: list[Ids] = [np.empty(0, np.int64)] * end
    for at in reversed(range(end)):
        parts = [ids for length, ids in pieces.parts(text[at:]) if len(allowed[at + length])]
        allowed[at] = np.concatenate([*parts, pieces.beginning(text[at:])])

    def following(ids: Sequence[int]) -> Ids | None:
        at = sum(pieces.lengths[id] for id in ids)
        return allowed[at] if at < end else None

    return following
