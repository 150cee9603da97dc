"""Who leaves the prefix cache first: leaves, and what layers with a window keep of nodes, least recently used first.

A leaf that was matched since it came to the head of its queue goes to its end again, once for each time its count of
matches can be halved: prompts that return outlive a flood of prompts that do not.

An entry says when its node had been used as it was queued; a node that was used since is queued again when its entry
comes up. So a use costs nothing, and what may not leave any more is dropped where it is met.
"""

import heapq
from collections.abc import Iterator
from itertools import count

from aiollm.engine.node import Node

CHANCES = 16  # leaves that one eviction may let off for their hits: no call walks the whole queue


class Queues:
    """Both queues, and the clock that they go by."""

    def __init__(self) -> None:
        self._clock = count(1)
        self._serial = count()
        self._leaves: list[tuple[int, int, Node]] = []  # (used, tie-break, leaf that may be evicted)
        self._windows: list[tuple[int, int, Node]] = []  # (aged, tie-break, node whose windows may be)

    def tick(self) -> int:
        """A moment later than all before."""
        return next(self._clock)

    def add_leaf(self, node: Node) -> None:
        """Queue a node, if it may leave and is not there."""
        if not node.queued and not node.pins and not node.children and node.parent is not None:
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._serial), node))

    def add_windows(self, node: Node) -> None:
        """Queue a node for its windows, if they may be lost and it is not there as old as it is now."""
        if node.listed != node.aged and not node.guards and node.windows is not None and node.parent is not None:
            node.listed = node.aged
            heapq.heappush(self._windows, (node.aged, next(self._serial), node))

    def leaving(self) -> Iterator[tuple[Node, bool]]:
        """The nodes of one eviction, out of their queue: True is a leaf, False one that loses its windows."""
        chances = CHANCES
        while self._leaves or self._windows:
            if self._windows and (not self._leaves or self._windows[0][0] < self._leaves[0][0]):
                aged, _, node = heapq.heappop(self._windows)
                if aged != node.listed:  # it stands elsewhere
                    continue
                node.listed = -1
                if aged == node.aged and not node.guards and node.windows is not None and node.parent is not None:
                    yield node, False
                else:
                    self.add_windows(node)
                continue
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.pins or node.children or node.parent is None:
                continue
            if node.hits and chances:
                chances -= 1
                node.hits >>= 1
                node.used = self.tick()
            if used == node.used:
                yield node, True
            else:
                self.add_leaf(node)
