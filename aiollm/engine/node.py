"""A node of the prefix cache: a run of tokens, the slots of their keys and values, and who needs them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.share import Part
from aiollm.wire.columns import Ints

Keys = NDArray[np.int64]
NO_KEYS: Keys = np.empty(0, np.int64)
NO_SLOTS: Ints = np.empty(0, np.int32)


class Node:
    """A run of tokens below its parent. `end` is the length of the sequence from the root through this node;
    `number` is the update that computes it, 0 for what was published already. `pinned_by` is the exclusive or of the
    numbers of all that pin it: of a node with one pin, the number of its only holder. `windows` are the slots of layers
    with a window, [groups of them, tokens], None once they are lost; they stay while there are `guards`. `part` is the
    one of the cache that it belongs to."""

    __slots__ = (
        "part", "keys", "slots", "windows", "children", "parent", "pins", "guards", "pinned_by", "used", "aged", "hits",
        "end", "queued", "listed", "number", "__weakref__",
    )  # fmt: skip

    def __init__(self, part: Part, parent: "Node | None", keys: Keys, slots: Ints, end: int, number: int = 0) -> None:
        self.part = part
        self.number = number
        self.parent = parent
        self.keys = keys
        self.slots = slots
        self.windows: Ints | None = None
        self.end = end
        self.children: dict[int, Node] = {}
        self.pins = self.guards = self.pinned_by = 0
        self.used = self.aged = self.hits = 0  # `aged` is to the windows what `used` is to the node
        self.queued = False  # stands in the queue of leaves
        self.listed = -1  # as what `aged` it stands in the queue of windows

    @property
    def start(self) -> int:
        return self.end - len(self.keys)


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
