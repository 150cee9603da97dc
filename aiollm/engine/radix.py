"""The prefix cache: a radix tree from token ids to KV slots, one slot per token.

A node owns its slots. Rows pin the path they use, from admission to retire; unpinned leaves are evicted, least
recently used first, from their end, so that a prefix shrinks before it disappears. A leaf that was matched since it
came to the head of that queue goes to its end again, once for each time its count of matches can be halved: prompts
that return outlive a flood of prompts that do not. A prompt's tokens enter when their chunk is *sent*: within an
iteration every store precedes every read, and iterations run in the order of the updates, so whoever matches them later
reads them later.
"""

import heapq
from collections.abc import Callable, Iterator
from itertools import count
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from aiollm.wire.columns import Ints

Keys = NDArray[np.int64]
NO_KEYS: Keys = np.empty(0, np.int64)
NO_SLOTS: Ints = np.empty(0, np.int32)
CHANCES = 16  # leaves that one eviction may let off for their hits: no call walks the whole queue


P = ParamSpec("P")
T = TypeVar("T")


def _timed(method: Callable[Concatenate["RadixIndex", P], T]) -> Callable[Concatenate["RadixIndex", P], T]:
    """Add what a call takes to `seconds`."""

    def timed(self: "RadixIndex", /, *args: P.args, **kwargs: P.kwargs) -> T:
        began = perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.seconds += perf_counter() - began

    timed.__doc__ = method.__doc__
    return timed


class Node:
    """A run of tokens below its parent. `end` is the length of the sequence from the root through this node;
    `number` is the update that computes it, 0 for what was published already. `pinned_by` is the exclusive or of the
    numbers of all that pin it: of a node with one pin, the number of its only holder."""

    __slots__ = (
        "keys", "slots", "children", "parent", "pins", "pinned_by", "used", "hits", "end", "queued", "number",
        "__weakref__",
    )  # fmt: skip

    def __init__(self, parent: "Node | None", keys: Keys, slots: Ints, end: int, number: int = 0) -> None:
        self.number = number
        self.parent = parent
        self.keys = keys
        self.slots = slots
        self.end = end
        self.children: dict[int, Node] = {}
        self.pins = self.pinned_by = 0
        self.used = self.hits = 0
        self.queued = False  # stands in the eviction queue

    @property
    def start(self) -> int:
        return self.end - len(self.keys)


class RadixIndex:
    """Counts: `total` tokens held, `pinned` of them on some holder's path, `alone[h]` of these on that of holder `h`
    only; `nodes` in all, `evicted` tokens and `seconds` of work so far.

    Holders are numbers from 0 to `holders` - 1.
    """

    def __init__(self, holders: int = 1) -> None:
        self.roots: WeakValueDictionary[str, Node] = WeakValueDictionary()
        """Clients name the namespaces, so a root must go with its last node: rows, loans and queued leaves keep it."""
        self.total = 0
        self.pinned = 0
        self.nodes = 0
        self.evicted = 0
        self.seconds = 0.0
        self.alone = np.zeros(holders, np.int64)
        self._clock = count(1)
        self._serial = count()
        self._queue: list[tuple[int, int, Node]] = []  # (used, tie-break, leaf that may be evicted)

    @property
    def evictable(self) -> int:
        return self.total - self.pinned

    def root(self, namespace: str) -> Node:
        """The root under which one namespace (adapter, salt) keeps its prefixes to itself."""
        node = self.roots.get(namespace)
        if node is None:
            node = self.roots[namespace] = Node(None, NO_KEYS, NO_SLOTS, 0)
        return node

    @_timed
    def peek(self, node: Node, keys: Keys) -> list[tuple[Node, int]]:
        """The nodes that continue `node` by `keys`, and how much of each does. Changes nothing."""
        return list(self._walk(node, keys))

    @_timed
    def match(self, node: Node, keys: Keys) -> tuple[Node, Ints]:
        """The node where the longest cached continuation of `node` by `keys` ends, and its slots.

        Splits a node that is matched in part. The caller pins the result before anything else happens.
        """
        parts = [NO_SLOTS]
        for child, length in self._walk(node, keys):
            node = self._split(child, length) if length < len(child.keys) else child
            node.used = next(self._clock)
            node.hits += 1
            parts.append(node.slots)
        return node, np.concatenate(parts)

    @_timed
    def extend(self, node: Node, keys: Keys, slots: Ints, number: int = 0) -> Node | None:
        """Give `keys` and their slots to the index as a child of `node`; None if a child begins alike already."""
        first = int(keys[0])
        if first in node.children:
            return None
        child = Node(node, keys.copy(), slots.copy(), node.end + len(keys), number)
        child.used = next(self._clock)
        node.children[first] = child
        self.nodes += 1
        self.total += len(keys)
        self._enqueue(child)
        return child

    @_timed
    def pin(self, node: Node, holder: int = 0, above: Node | None = None) -> None:
        """Keep the path to `node` from eviction; the part that ends at `above` is pinned by this holder already."""
        step = node
        while step is not above and step.parent is not None:
            length = len(step.keys)
            if step.pins == 0:
                self.pinned += length
                self.alone[holder] += length
            elif step.pins == 1:
                self.alone[step.pinned_by] -= length
            step.pins += 1
            step.pinned_by ^= holder
            step = step.parent

    @_timed
    def unpin(self, node: Node, holder: int = 0) -> None:
        """Undo one `pin` of the whole path."""
        for step in path(node):
            length = len(step.keys)
            step.pins -= 1
            step.pinned_by ^= holder
            assert step.pins >= 0, "unpinned more often than pinned"
            if step.pins == 0:
                self.pinned -= length
                self.alone[holder] -= length
                self._enqueue(step)
            elif step.pins == 1:
                self.alone[step.pinned_by] += length

    @_timed
    def evict(self, wanted: int) -> Ints:
        """Free up to `wanted` slots of unpinned leaves, least recently used first, with a second chance for hits."""
        freed, chances = [NO_SLOTS], CHANCES
        while wanted > 0 and self._queue:
            used, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.pins or node.children or node.parent is None:
                continue
            if node.hits and chances:
                chances -= 1
                node.hits >>= 1
                node.used = next(self._clock)
            if used != node.used:
                self._enqueue(node)
                continue
            keep = max(0, len(node.keys) - wanted)
            freed.append(node.slots[keep:])
            wanted -= len(node.keys) - keep
            self.evicted += len(node.keys) - keep
            self.total -= len(node.keys) - keep
            if keep:
                node.end -= len(node.keys) - keep
                node.keys, node.slots = node.keys[:keep], node.slots[:keep]
                self._enqueue(node)
            else:
                self._unlink(node)
        return np.concatenate(freed)

    def cut(self, node: Node, keys: Keys, begin: int, number: int) -> Node | None:
        """The subtree below `node` on the way of `keys` that update `number` was to compute from position `begin`.

        Cut off at `begin`; None where it has left the index already. Rows that pin it must let go before `remove`.
        """
        for child, length in self._walk(node, keys):
            if child.number == number and child.start <= begin < child.start + length:
                if begin > child.start:
                    self._split(child, begin - child.start)
                return child
        return None

    def remove(self, top: Node) -> Ints:
        """Take a subtree that nobody pins out of the index; its slots are the caller's to free."""
        self._unlink(top)
        freed = [NO_SLOTS]
        for node in subtree(top):
            assert node.pins == 0, "a poisoned node is still in use"
            self.nodes -= node is not top
            self.total -= len(node.keys)
            freed.append(node.slots)
            node.children, node.parent = {}, None
        return np.concatenate(freed)

    def _walk(self, node: Node, keys: Keys) -> Iterator[tuple[Node, int]]:
        at = 0
        while at < len(keys):
            child = node.children.get(int(keys[at]))
            if child is None:
                return
            length = common_prefix(child.keys, keys[at:])
            partial = length < len(child.keys)  # asked before the yield: `match` splits the child there
            yield child, length
            if partial:
                return
            at += length
            node = child

    def _split(self, node: Node, length: int) -> Node:
        """Cut a node in two; the new upper half is returned, the lower half stays the object that rows pinned."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.keys[:length], node.slots[:length], node.start + length, node.number)
        upper.pins, upper.pinned_by = node.pins, node.pinned_by
        upper.used, upper.hits = node.used, node.hits
        self.nodes += 1
        parent.children[int(upper.keys[0])] = upper
        node.keys, node.slots, node.parent = node.keys[length:], node.slots[length:], upper
        upper.children[int(node.keys[0])] = node
        return upper

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.keys[0])]
        node.parent = None
        self.nodes -= 1
        self._enqueue(parent)

    def _enqueue(self, node: Node) -> None:
        if not node.queued and not node.pins and not node.children and node.parent is not None:
            node.queued = True
            heapq.heappush(self._queue, (node.used, next(self._serial), node))

    def check(self) -> Ints:
        """All slots held, after checking the tree and its counts; raises AssertionError."""
        slots, total, pinned, nodes = [NO_SLOTS], 0, 0, 0
        alone = np.zeros_like(self.alone)
        for root in self.roots.values():
            for node in subtree(root):
                assert len(node.keys) == len(node.slots)
                for first, child in node.children.items():
                    assert first == int(child.keys[0]) and child.parent is node, "a child is misfiled"
                    assert child.end == node.end + len(child.keys), "a depth is wrong"
                    assert child.pins <= node.pins or node is root, "a path is pinned in part"
                if node is not root:
                    assert len(node.keys), "an empty node"
                    assert node.queued or node.pins or node.children, "a leaf cannot be evicted"
                    total += len(node.keys)
                    nodes += 1
                    pinned += len(node.keys) if node.pins else 0
                    if node.pins == 1:
                        alone[node.pinned_by] += len(node.keys)
                    slots.append(node.slots)
        assert (total, pinned, nodes) == (self.total, self.pinned, self.nodes), "counts are wrong"
        assert (alone == self.alone).all(), "who pins what alone is wrong"
        return np.concatenate(slots)


def path(node: Node) -> Iterator[Node]:
    """A node and its ancestors, the root left out."""
    step: Node | None = node
    while step is not None and step.parent is not None:
        yield step
        step = step.parent


def subtree(top: Node) -> Iterator[Node]:
    """A node and all below it."""
    stack = [top]
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def common_prefix(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Length of the longest common prefix of two arrays."""
    length = min(len(left), len(right))
    if left[:length].tobytes() == right[:length].tobytes():
        return length
    return int(np.argmax(left[:length] != right[:length]))
