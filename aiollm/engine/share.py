"""Parts of the prefix cache, one for each API key that keeps its prompts to itself, and what each may keep for reuse.

A part beyond its share is the first to lose something when room is wanted, and it loses what it used longest ago; so
one key that asks for ever new prompts cannot drive out what the others have cached. While nobody wants room, or nobody
else has anything there, a part grows as it likes.
"""

import heapq
from collections.abc import Callable, Mapping
from itertools import count
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aiollm.engine.node import Node

SPARE = 64  # entries of a ranking that may be out of date, beside one for each part
SEPARATOR = "\0"  # behind the name of a part; what follows divides it into namespaces


class Shares(NamedTuple):
    """Shares, above 0 and at most 1, of the slots that the prefix cache keeps for reuse."""

    each: float = 1.0
    own: Mapping[str, float] = MappingProxyType({})
    """Of parts, by name, that have another share than `each`."""

    def of(self, name: str) -> float:
        return self.own.get(name, self.each)


WHOLE = Shares()


class Part:
    """`kept` slots that nobody pins, and a heap of what may leave: (used or aged, kind of entry, tie-break, node)."""

    __slots__ = ("name", "share", "kept", "heap")

    def __init__(self, name: str, share: float) -> None:
        self.name = name
        self.share = share
        self.kept = 0
        self.heap: list[tuple[int, int, int, Node]] = []

    @property
    def oldest(self) -> float:
        """The moment of what comes first in its heap."""
        return self.heap[0][0] if self.heap else inf

    @property
    def room(self) -> float:
        """The smaller, the fuller in proportion to its share."""
        return -self.kept / self.share if self.kept > 0 else inf


class Ranking:
    """Parts by a number of theirs, the smallest first; those of inf are left out.

    Numbers may rise untold: a part stands where it was when its number fell last, and is put right once it comes first.
    """

    def __init__(self, number: Callable[[Part], float]) -> None:
        self.noted: dict[Part, float] = {}
        """Where they stand."""
        self._number = number
        self._serial = count()
        self._heap: list[tuple[float, int, Part]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def note(self, part: Part) -> None:
        """Its number may have fallen."""
        number = self._number(part)
        if number < self.noted.get(part, inf):
            self.noted[part] = number
            heapq.heappush(self._heap, (number, next(self._serial), part))
            if len(self._heap) > 2 * len(self.noted) + SPARE:  # most of them stand elsewhere by now
                self._heap = [(number, next(self._serial), part) for part, number in self.noted.items()]
                heapq.heapify(self._heap)

    def first(self) -> Part | None:
        """The part of the smallest number."""
        while self._heap:
            number, _, part = self._heap[0]
            noted = self.noted.get(part)
            if number == noted == self._number(part):
                return part
            heapq.heappop(self._heap)
            if number == noted:  # else it stands elsewhere
                del self.noted[part]
                self.note(part)
        return None
