"""Who leaves the prefix cache first: leaves, and what layers with a window keep of nodes, least recently used first, of
a part beyond its share before all others (share.py).

A leaf that was matched since it came to the head of its queue goes to its end again, once for each time its count of
matches can be halved: prompts that return outlive a flood of prompts that do not.

An entry says when its node had been used as it was queued; a node that was used since is queued again when its entry
comes up. So a use costs nothing, and what may not leave any more is dropped where it is met.
"""

import heapq
from collections.abc import Callable, Iterator
from itertools import count

from aiollm.engine.node import Node
from aiollm.engine.share import SEPARATOR, Part, Ranking, Shares

CHANCES = 16  # leaves that one eviction may let off for their hits: no call walks the whole queue
LEAF, WINDOWS = 0, 1  # entries: of a leaf that may be evicted, of a node whose windows may be


class Queues:
    """The queues of all parts, and the clock that they go by."""

    def __init__(self, shares: Shares) -> None:
        self.parts: dict[str, Part] = {}
        """By name; ranked as soon as there are several."""
        self.oldest = Ranking(lambda part: part.oldest)
        self.fullest = Ranking(lambda part: part.room)
        self.several = False
        self._shares = shares
        self._clock = count(1)
        self._serial = count()

    def part(self, namespace: str) -> Part:
        """The part of the cache that a namespace belongs to."""
        name = namespace.partition(SEPARATOR)[0]
        part = self.parts.get(name)
        if part is None:
            part = self.parts[name] = Part(name, self._shares.of(name))
            self.several = len(self.parts) > 1
            if len(self.parts) == 2:
                for each in self.parts.values():
                    self.oldest.note(each)
                    self.fullest.note(each)
        return part

    def reshare(self, shares: Shares) -> None:
        """Other shares from now on."""
        self._shares = shares
        for part in self.parts.values():
            part.share = shares.of(part.name)
            self.grew(part)

    def grew(self, part: Part) -> None:
        """A part may keep more than before, or more of its share."""
        if self.several:
            self.fullest.note(part)

    def tick(self) -> int:
        """A moment later than all before."""
        return next(self._clock)

    def add_leaf(self, node: Node) -> None:
        """Queue a node, if it may leave and is not there."""
        if not node.queued and not node.pins and not node.children and node.parent is not None:
            node.queued = True
            self._push(node.used, LEAF, node)

    def add_windows(self, node: Node) -> None:
        """Queue a node for its windows, if they may be lost and it is not there as old as it is now, or older."""
        there = 0 <= node.listed <= node.aged
        if not there and not node.guards and node.windows is not None and node.parent is not None:
            node.listed = node.aged
            self._push(node.aged, WINDOWS, node)

    def _push(self, when: int, kind: int, node: Node) -> None:
        part = node.part
        heapq.heappush(part.heap, (when, kind, next(self._serial), node))
        if self.several:
            self.oldest.note(part)

    def leaving(self, kept: Callable[[], int]) -> Iterator[tuple[Node, bool]]:
        """The nodes of one eviction, out of their queue: True is a leaf, False one that loses its windows.

        `kept` are the slots of all parts that nobody pins, at the moment of asking.
        """
        chances = CHANCES
        only = None if self.several else next(iter(self.parts.values()), None)
        while (part := only or self._next(kept())) is not None and part.heap:
            when, kind, _, node = heapq.heappop(part.heap)
            if kind == WINDOWS:
                if when != node.listed:  # it stands elsewhere
                    continue
                node.listed = -1
                if when == node.aged and not node.guards and node.windows is not None and node.parent is not None:
                    yield node, False
                else:
                    self.add_windows(node)
                continue
            node.queued = False
            if node.pins or node.children or node.parent is None:
                continue
            if node.hits and chances:
                chances -= 1
                node.hits >>= 1
                node.used = self.tick()
            if when == node.used:
                yield node, True
            else:
                self.add_leaf(node)

    def _next(self, kept: int) -> Part | None:
        """The part that something leaves next: one beyond its share, else that of the oldest entry."""
        fullest = self.fullest.first()
        if fullest is not None and fullest.kept > fullest.share * kept:
            return fullest
        return self.oldest.first()
