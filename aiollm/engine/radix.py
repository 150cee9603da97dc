"""The prefix cache: a radix tree from token ids to KV slots.

A node owns its slots. Rows pin the path they use, from admission to retire; unpinned leaves are evicted (eviction.py),
from their end, so that a prefix shrinks before it disappears. A prompt's tokens enter when their chunk is *sent*:
within an iteration every store precedes every read, and iterations run in the order of the updates, so whoever matches
them later reads them later.

Layers with a sliding window need but the last tokens of a sequence. A node may lose what they keep (`windows`) and live
on for the other layers; rows guard the nodes that their window reaches. A match ends where all tokens that a window
shows from there are still complete.
"""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from aiollm.engine.eviction import Queues
from aiollm.engine.node import NO_KEYS, NO_SLOTS, Keys, Node, common_prefix, path, subtree
from aiollm.engine.share import WHOLE, Shares
from aiollm.engine.window import NO_WINDOW, Window
from aiollm.wire.columns import Ints

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


class RadixIndex:
    """Counts: `total` slots held, `pinned` of them on some holder's path, `alone[h]` of these on that of holder `h`
    only; `nodes` in all, `evicted` tokens and `seconds` of work so far. What nobody guards of windows is not pinned.

    Holders are numbers from 0 to `holders` - 1.
    """

    def __init__(self, holders: int = 1, window: Window = NO_WINDOW, shares: Shares = WHOLE) -> None:
        self.roots: WeakValueDictionary[str, Node] = WeakValueDictionary()
        """Clients name the namespaces, so a root must go with its last node: rows, loans and queued leaves keep it."""
        self.total = 0
        self.pinned = 0
        self.nodes = 0
        self.evicted = 0
        self.seconds = 0.0
        self.alone = np.zeros(holders, np.int64)
        self.queues = Queues(shares)
        self._behind = window.behind
        self.windowed = window.groups

    @property
    def evictable(self) -> int:
        return self.total - self.pinned

    def root(self, namespace: str) -> Node:
        """The root under which one namespace (key, salt) keeps its prefixes to itself."""
        node = self.roots.get(namespace)
        if node is None:
            node = self.roots[namespace] = Node(self.queues.part(namespace), None, NO_KEYS, NO_SLOTS, 0)
        return node

    @_timed
    def peek(self, node: Node, keys: Keys) -> list[tuple[Node, int]]:
        """The nodes that continue `node` by `keys` as far as `match` goes, and how much of each does. Changes nothing.

        What windows show before `node` is taken to be complete.
        """
        return self._usable(node, keys)

    def _usable(self, node: Node, keys: Keys) -> list[tuple[Node, int]]:
        found = list(self._walk(node, keys))
        if not self._behind:
            return found
        complete, usable, at = 0, 0, node.end
        for place, (child, length) in enumerate(found, 1):
            at += length
            if child.windows is None:
                complete = at  # from here on
            if not complete or at - complete >= self._behind:
                usable = place
        return found[:usable]

    @_timed
    def match(self, node: Node, keys: Keys) -> tuple[Node, Ints]:
        """The node where the longest cached continuation of `node` by `keys` ends that a row may take over, and its
        slots.

        Splits a node that is matched in part. The caller pins the result before anything else happens.
        """
        parts = [NO_SLOTS]
        for child, length in self._usable(node, keys):
            node = self._use(child, length)
            parts.append(node.slots)
        return node, np.concatenate(parts)

    @_timed
    def trace(self, node: Node, keys: Keys) -> tuple[Node, int]:
        """The node where the longest continuation of `node` by `keys` ends, complete or not, and its length."""
        begin = node.end
        for child, length in list(self._walk(node, keys)):
            node = self._use(child, length)
        return node, node.end - begin

    @_timed
    def slots(self, node: Node, begin: int) -> Ints:
        """The slots on the way to `node` from position `begin` on, which is where a node begins; [groups, tokens], of
        windows 0 where they are lost."""
        found: Ints = np.zeros((1 + self.windowed, node.end - begin), np.int32)
        for step in path(node):
            if step.start < begin:
                break
            found[0, step.start - begin : step.end - begin] = step.slots
            if step.windows is not None:
                found[1:, step.start - begin : step.end - begin] = step.windows
        return found

    @_timed
    def extend(self, node: Node, keys: Keys, slots: Ints, number: int = 0, windows: Ints | None = None) -> Node | None:
        """Give `keys` and their slots to the index as a child of `node`; None if a child begins alike already."""
        first = int(keys[0])
        if first in node.children:
            return None
        child = Node(node.part, node, keys.copy(), slots.copy(), node.end + len(keys), number)
        child.used = child.aged = self.queues.tick()
        node.children[first] = child
        self.nodes += 1
        self._hold(child, len(keys))
        self.queues.add_leaf(child)
        if windows is not None and self.windowed:
            self._complete(child, windows)
        return child

    @_timed
    def step(self, node: Node, keys: Keys) -> tuple[Node, int] | None:
        """The child of `node` that continues it by `keys`, complete or not, and how much of it does.

        Changes nothing.
        """
        return next(self._walk(node, keys), None)

    @_timed
    def take_over(self, node: Node, length: int) -> Node:
        """The first tokens of a node as a node of its own, for somebody who completes it."""
        return self._use(node, length)

    @_timed
    def complete(self, node: Node, windows: Ints) -> None:
        """Give a node the slots of windows that it lacks."""
        self._complete(node, windows)

    def _complete(self, node: Node, windows: Ints) -> None:
        node.windows = windows.copy()
        node.aged = self.queues.tick()
        self._hold(node, windows.size)
        self.queues.add_windows(node)

    @_timed
    def pin(self, node: Node, holder: int = 0, above: Node | None = None, low: int = 0) -> int:
        """Keep the path to `node` from eviction; the part that ends at `above` is pinned by this holder already.

        Nodes that end behind `low` are guarded; the value is where the first of them begins.
        """
        step, kept = node, node.end
        while step is not above and step.parent is not None:
            self._weigh(step, -1)
            step.pins += 1
            step.pinned_by ^= holder
            if step.end > low:
                kept = step.start
                step.guards += 1
                step.aged = step.used
            self._weigh(step, 1)
            step = step.parent
        return kept

    @_timed
    def unpin(self, node: Node, holder: int = 0, kept: int = 0) -> None:
        """Undo one `pin` of the whole path, of which this holder guards the nodes from position `kept` on."""
        for step in path(node):
            self._weigh(step, -1)
            step.pins -= 1
            step.pinned_by ^= holder
            assert step.pins >= 0, "unpinned more often than pinned"
            step.guards -= step.start >= kept
            self._weigh(step, 1)
            self.queues.add_leaf(step)
            self.queues.add_windows(step)
        self.queues.grew(node.part)

    @_timed
    def release(self, node: Node, kept: int, low: int, tail: int) -> int:
        """Guard no longer what ends at `low` or before, of the nodes from `kept` on that a holder of `node` guards; the
        new `kept`. Windows up to `tail` that were never matched are the first to be lost."""
        first = node.end
        for step in path(node):
            if step.start < kept:
                break
            if step.end > low:
                first = step.start
                continue
            self._weigh(step, -1)
            step.guards -= 1
            self._weigh(step, 1)
            if not step.hits and step.end <= tail:
                step.aged = 0
            self.queues.add_windows(step)
        self.queues.grew(node.part)
        return first

    def _weigh(self, node: Node, sign: int) -> None:
        """Count a node's slots with the pinned ones, or take them off."""
        if node.pins:
            held = sign * len(node.keys) * (1 + self.windowed if node.guards else 1)
            self.pinned += held
            node.part.kept -= held
            if node.pins == 1:
                self.alone[node.pinned_by] += held

    def _hold(self, node: Node, slots: int) -> None:
        """Count so many more slots of a node with those that are held, or fewer."""
        self.total += slots
        node.part.kept += slots
        if slots > 0:
            self.queues.grew(node.part)

    @_timed
    def evict(self, wanted: int) -> Ints:
        """Free at least `wanted` slots, or all that may be: of unpinned leaves and of windows that nobody guards, least
        recently used first, of parts beyond their share before all others; leaves have a second chance for hits."""
        freed, leaving = [NO_SLOTS], self.queues.leaving(lambda: self.total - self.pinned)
        while wanted > 0 and (found := next(leaving, None)) is not None:
            node, itself = found
            freed.append(self._shorten(node, wanted) if itself else self._lose(node))
            wanted -= len(freed[-1])
        return np.concatenate(freed)

    def _shorten(self, node: Node, wanted: int) -> Ints:
        """As many slots of a leaf's end, or all."""
        each = 1 if node.windows is None else 1 + self.windowed
        gone = min(len(node.keys), -(-wanted // each))
        keep = len(node.keys) - gone
        freed = node.slots[keep:]
        if node.windows is not None:
            freed = np.concatenate([freed, node.windows[:, keep:].ravel()])
        self.evicted += gone
        self._hold(node, -gone * each)
        if keep:
            node.end -= gone
            node.keys, node.slots = node.keys[:keep], node.slots[:keep]
            if node.windows is not None:
                node.windows = node.windows[:, :keep]
            self.queues.add_leaf(node)
        else:
            self._unlink(node)
        return freed

    def _lose(self, node: Node) -> Ints:
        """A node's windows, which it lives on without."""
        assert node.windows is not None
        lost, node.windows = node.windows.ravel(), None
        self._hold(node, -len(lost))
        return lost

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
            freed.append(node.slots)
            if node.windows is not None:
                freed.append(node.windows.ravel())
            self._hold(node, -len(node.keys) * (1 if node.windows is None else 1 + self.windowed))
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

    def _use(self, node: Node, length: int) -> Node:
        """The first tokens of a node, a node of its own from now on, as they are used again."""
        if length < len(node.keys):
            node = self._split(node, length)
        node.used = self.queues.tick()
        node.hits += 1
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Cut a node in two; the new upper half is returned, the lower half stays the object that rows pinned."""
        parent = node.parent
        assert parent is not None
        upper = Node(node.part, parent, node.keys[:length], node.slots[:length], node.start + length, node.number)
        upper.pins, upper.guards, upper.pinned_by = node.pins, node.guards, node.pinned_by
        upper.used, upper.aged, upper.hits = node.used, node.aged, node.hits
        if node.windows is not None:
            upper.windows, node.windows = node.windows[:, :length], node.windows[:, length:]
        self.nodes += 1
        parent.children[int(upper.keys[0])] = upper
        node.keys, node.slots, node.parent = node.keys[length:], node.slots[length:], upper
        upper.children[int(node.keys[0])] = node
        self.queues.add_windows(upper)
        return upper

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.keys[0])]
        node.parent = None
        self.nodes -= 1
        self.queues.add_leaf(parent)
