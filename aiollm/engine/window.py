"""Layers with a sliding window: what they make a token cost, and for how long.

Layers are shared out to groups of one size. A token takes a slot for the group that sees everything, for ever, and one
for each group with a window, until no position that is still to come looks back so far.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]


class Window(NamedTuple):
    """The default is that of a model without such layers."""

    tokens: int = 0
    """Positions that a query sees, its own included."""
    groups: int = 0
    """Of layers with a window."""

    @property
    def each(self) -> int:
        """Slots of a token that every layer still sees."""
        return 1 + self.groups

    @property
    def behind(self) -> int:
        """Tokens before a position that are seen from there."""
        return max(0, self.tokens - 1) if self.groups else 0

    @property
    def step(self) -> int:
        """Tokens that go back at once: each look at a row costs time."""
        return max(1, self.tokens // 16)

    @property
    def reach(self) -> int:
        """Tokens of a row that have slots in layers with a window."""
        return self.behind + self.step

    def growth(self, known: Column | int, steps: Column) -> Column | int:
        """Slots that rows of `known` tokens will take in so many steps, besides one for each."""
        return self.groups and self.groups * np.minimum(steps, np.maximum(0, self.reach - known))

    def seen(self, tokens: Column) -> Column | int:
        """Slots that so many tokens of a row have besides one for each."""
        return self.groups and self.groups * np.clip(tokens, 0, self.reach)

    def low(self, position: int) -> int:
        """Where what every layer sees from a position begins."""
        return max(0, position - self.behind) if self.groups else 0

    def worst(self, tokens: int, chunk: int) -> int:
        """Slots that a row of so many tokens holds at most, when chunks have `chunk` tokens: a node of the index, a
        chunk or what was generated at a time, is guarded as a whole."""
        return tokens + self.groups * min(tokens, self.reach + max(chunk, self.reach))

    def longest(self, slots: int, chunk: int) -> int:
        """Tokens of the longest row that a pool of `slots` holds."""
        return max(slots // self.each, slots - self.groups * (self.reach + max(chunk, self.reach)))


NO_WINDOW = Window()
