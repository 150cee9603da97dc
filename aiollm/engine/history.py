"""What is known of output lengths: the "past" half of the Past-Future scheduler (Gong et al., ASPLOS 2025, 2.2).

A window of the latest finished lengths is an empirical distribution. The length of a row that has put out d tokens is
drawn from it on condition that it is longer than d, by the inverse of the distribution with linear interpolation, and
from the last known length up to max_tokens as its tail. Beyond the paper:

- Classes (model, size of max_tokens, tools or not) have windows of their own, and use the pooled one while young.
- An empty history is no length at all: until enough requests have ended, imagined ones are mixed in whose lengths lie
  anywhere below max_tokens, long ones rather than short ones. Neither everybody's worst case nor nothing; and it errs
  on the side that is corrected soon, since short outputs end first.
- Where the latest lengths are no longer distributed as those before them (two samples of Kolmogorov and Smirnov), the
  older ones are forgotten.
"""

from collections import deque
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.rows import Column

WINDOW = 1000  # finished requests that are remembered, as in the paper
YOUNG = 64  # a class with fewer finished requests uses the pooled window
PRIOR = 16  # imagined requests in an empty window; none are left once GROWN have ended
GROWN = 64
RECENT = 100  # latest lengths that are compared with those before them, at every half of this number
DRIFT = 1.95  # Kolmogorov-Smirnov at a chance of 0.1 % to see a drift where there is none
CLASSES = 256  # more are pooled
POOLED = 0  # number of the class of all


class Window:
    """The latest finished lengths of one class; `sorted` is rebuilt when asked for after a change."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=WINDOW)
        self._sorted: Column = np.empty(0, np.int64)
        self._fresh = True
        self._since = 0
        self.drifts = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, length: int) -> None:
        self._lengths.append(length)
        self._fresh = False
        self._since += 1
        if self._since >= RECENT // 2 and len(self._lengths) >= 2 * RECENT:
            self._since = 0
            self._forget_what_drifted()

    def _forget_what_drifted(self) -> None:
        lengths = np.fromiter(self._lengths, np.int64)
        old, new = np.sort(lengths[:-RECENT]), np.sort(lengths[-RECENT:])
        if distance(old, new) > DRIFT * np.sqrt((len(old) + len(new)) / (len(old) * len(new))):
            self._lengths = deque(lengths[-RECENT:].tolist(), maxlen=WINDOW)
            self.drifts += 1

    @property
    def sorted(self) -> Column:
        if not self._fresh:
            self._sorted = np.sort(np.fromiter(self._lengths, np.int64))
            self._fresh = True
        return self._sorted


class History:
    """Finished output lengths by class. Classes are numbers in a column of the rows; `POOLED` is all of them."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._windows = [Window()]

    @property
    def pooled(self) -> Window:
        return self._windows[POOLED]

    @property
    def drifts(self) -> int:
        """How often a window forgot its older part."""
        return sum(window.drifts for window in self._windows)

    def number(self, name: Hashable) -> int:
        """The number of a class, which need not have been heard of."""
        found = self._numbers.get(name)
        if found is None:
            if len(self._windows) >= CLASSES:
                return POOLED
            found = self._numbers[name] = len(self._windows)
            self._windows.append(Window())
        return found

    def add(self, name: Hashable, length: int) -> None:
        """A request of this class ended by itself after `length` tokens."""
        self.pooled.add(length)
        if (number := self.number(name)) != POOLED:
            self._windows[number].add(length)

    def draw(self, kinds: Column, done: Column, cap: Column, chances: NDArray[np.float64]) -> Column:
        """Total output lengths, [draws, n], of rows of class `kinds` that have put out `done` of at most `cap` tokens.
        `chances` [draws, n] in [0, 1) say where each lies in its distribution."""
        grown = np.array([at if len(window) >= YOUNG else POOLED for at, window in enumerate(self._windows)])[kinds]
        if not len(grown) or (grown == grown[0]).all():
            known = self._windows[grown[0] if len(grown) else POOLED].sorted
            return _bounded(_inverse(known, done, cap, chances), done, cap)
        lengths = np.empty(chances.shape, np.float64)
        for number in np.unique(grown).tolist():
            mine = grown == number
            lengths[:, mine] = _inverse(self._windows[number].sorted, done[mine], cap[mine], chances[:, mine])
        return _bounded(lengths, done, cap)


def _inverse(known: Column, done: Column, cap: Column, chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the conditional distribution reaches `chances`."""
    below = np.searchsorted(known, done, side="right")
    segments = len(known) - below + 1  # from `done` to each longer length, and from the last one to `cap`
    weight = PRIOR * max(0.0, 1 - len(known) / GROWN)
    prior = weight * (1 - (done / np.maximum(1, cap)) ** 2) if weight else 0.0
    at = chances * (segments + prior)
    step = np.minimum(at.astype(np.int64), segments - 1)
    padded = np.append(known, 0)
    left = np.where(step > 0, padded[below + step - 1], done)
    right = np.where(step < segments - 1, padded[below + step], np.maximum(cap, left))
    found: NDArray[np.float64] = left + (right - left) * (at - step)
    if not weight:
        return found
    imagined = np.sqrt(done**2 + (cap**2 - done**2) * np.clip((at - segments) / np.maximum(prior, 1e-9), 0, 1))
    return np.where(at < segments, found, imagined)


def _bounded(lengths: NDArray[np.float64], done: Column, cap: Column) -> Column:
    """One more token comes at least, and no more than `cap`."""
    least = np.minimum(cap, done + 1)
    return np.minimum(np.maximum(np.rint(lengths).astype(np.int64), least), cap)


def distance(left: Column, right: Column) -> float:
    """The largest difference of two empirical distributions, both sorted."""
    both = np.concatenate([left, right])
    shares = (np.searchsorted(side, both, side="right") / len(side) for side in (left, right))
    return float(np.abs(np.subtract(*shares)).max())
