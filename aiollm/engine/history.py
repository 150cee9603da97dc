"""What is known of output lengths: the "past" half of the Past-Future scheduler (Gong et al., ASPLOS 2025, 2.2).

A window of the latest finished lengths is an empirical distribution. The length of a row that has put out d tokens is
drawn from it on condition that it is longer than d, by the inverse of the distribution with linear interpolation, and
a tail from the last known length to max_tokens. Beyond the paper:

- In the tail nothing is known, so any doubling of the length is as likely as the next one.
- Rows that run are evidence too: they were not done so far. Without them a young window has seen short outputs only,
  since these end first, and so has one behind a drift to longer ones.
- Classes (model, size of max_tokens, tools or not) have windows of their own, and use the pooled one while young.
- An empty history is no length at all: until enough requests have ended, imagined ones are mixed in whose lengths lie
  anywhere below max_tokens, long ones rather than short ones. Neither everybody's worst case nor nothing; and it errs
  on the side that is corrected soon, since short outputs end first.
- Where the latest lengths are no longer distributed as those before them (two samples of Kolmogorov and Smirnov), the
  older ones are forgotten.
"""

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiollm.engine.rows import Column

WINDOW = 1000  # finished requests that are remembered, as in the paper
YOUNG = 64  # a class with fewer finished requests uses the pooled window
PRIOR = 16  # imagined requests in an empty window; none are left once GROWN have ended
GROWN = 64
RECENT = 100  # latest lengths that are compared with those before them, at every half of this number
DRIFT = 1.95  # Kolmogorov-Smirnov at a chance of 0.1 % to see a drift where there is none
MIXED = 4  # times as many must have ended as run at once: of those that began together the short ones end first
CLASSES = 256  # more are pooled
POOLED = 0  # number of the class of all


class Curve(NamedTuple):
    """A distribution of lengths in parts of the same weight. `edges` are where parts end, in ascending order between
    two zeros; `ranks` how many edges are no longer than 0, 1, 2, ... tokens: with that table 1,000 rows find their
    places in 5 us, where a binary search for each took 70. `tail` parts lie beyond the last edge."""

    edges: Column
    ranks: Column
    tail: float


def curve_of(finished: Column, running: Column, weight: float) -> Curve:
    """The curve of `finished` lengths, ascending, and of rows that have put out `running` tokens and are not done: the
    estimate of Kaplan and Meier, in which a running row counts as `weight` of one."""
    count, tail = len(finished), 1.0
    if count and len(running) and weight > 0:
        beyond = len(running) - np.searchsorted(np.sort(running), finished)
        left = np.cumprod(1 - 1 / (np.arange(count + 1, 1, -1) + weight * beyond))  # share of lengths that are longer
        part = (1 - left[-1]) / count
        tail = float(left[-1] / part)
        finished = np.rint(np.interp(part * np.arange(1, count + 1), 1 - left, finished)).astype(np.int64)
    edges = np.zeros(count + 2, np.int64)
    edges[1:-1] = finished
    return Curve(edges, np.cumsum(np.bincount(finished, minlength=1)), tail)


class Window:
    """The latest finished lengths of one class."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=WINDOW)
        self._running: Column = np.empty(0, np.int64)
        self._curve: Curve | None = None
        self._ended = self._since = self._crowd = 0
        self.drifts = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, length: int) -> None:
        self._lengths.append(length)
        self._curve = None
        self._ended += 1
        self._since += 1
        if self._since >= RECENT // 2 and len(self._lengths) >= min(WINDOW, max(2 * RECENT, MIXED * self._crowd)):
            self._since = 0
            self._forget_what_drifted()

    def _forget_what_drifted(self) -> None:
        lengths = np.fromiter(self._lengths, np.int64)
        old, new = np.sort(lengths[:-RECENT]), np.sort(lengths[-RECENT:])
        if distance(old, new) > DRIFT * np.sqrt((len(old) + len(new)) / (len(old) * len(new))):
            self._lengths = deque(lengths[-RECENT:].tolist(), maxlen=WINDOW)
            self._ended, self._crowd = RECENT, 0
            self.drifts += 1

    @property
    def changed(self) -> bool:
        """Whether a length came in since somebody drew."""
        return self._curve is None

    def observe(self, running: Column) -> None:
        """What rows of this class have put out that run now; to be told before a changed window is drawn from."""
        self._running = running
        self._crowd = max(self._crowd, len(running))

    @property
    def curve(self) -> Curve:
        """The distribution of lengths."""
        if self._curve is None:
            lengths = np.sort(np.fromiter(self._lengths, np.int64))
            weight = min(1.0, 2 - self._ended / WINDOW)  # rows that began before the window make up for those that run
            self._curve = curve_of(lengths, self._running, weight)
        return self._curve


class History:
    """Finished output lengths by class. Classes are numbers in a column of the rows; `POOLED` is all of them."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._windows = [Window()]
        self._grown = np.zeros(1, np.int64)
        """Which window a class uses: its own one once that is not young."""

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
            self._grown = np.append(self._grown, POOLED)
        return found

    def add(self, name: Hashable, length: int) -> None:
        """A request of this class ended by itself after `length` tokens."""
        self.pooled.add(length)
        if (number := self.number(name)) != POOLED:
            self._windows[number].add(length)
            if len(self._windows[number]) >= YOUNG:
                self._grown[number] = number

    def observe(self, kinds: Column, done: Column) -> None:
        """Tell of the rows that run: their classes, and their output tokens so far."""
        if self.pooled.changed:
            self.pooled.observe(done)
        for number, window in enumerate(self._windows[1:], 1):
            if window.changed and len(window) >= YOUNG:
                window.observe(done[kinds == number])

    def draw(self, kinds: Column, done: Column, cap: Column, chances: NDArray[np.float64]) -> Column:
        """Total output lengths, [draws, n], of rows of class `kinds` that have put out `done` of at most `cap` tokens.
        `chances` [draws, n] in [0, 1) say where each lies in its distribution."""
        grown = self._grown[kinds]
        number = int(grown[0]) if len(grown) else POOLED
        if (grown == number).all():
            return _bounded(_inverse(self._windows[number], done, cap, chances), done, cap)
        lengths = np.empty(chances.shape, np.float64)
        for number in np.unique(grown).tolist():
            mine = grown == number
            lengths[:, mine] = _inverse(self._windows[number], done[mine], cap[mine], chances[:, mine])
        return _bounded(lengths, done, cap)


def _inverse(window: Window, done: Column, cap: Column, chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the conditional distribution reaches `chances`."""
    edges, ranks, tail = window.curve
    count = len(window)
    below = ranks.take(done, mode="clip")
    longer = count - below  # edges; the first part reaches from `done` to the first of them, the tail to `cap`
    weight = PRIOR * max(0.0, 1 - count / GROWN)
    prior = weight * (1 - (done / np.maximum(1, cap)) ** 2) if weight else 0.0
    at = chances * (longer + (tail + prior))
    step = np.minimum(at.astype(np.int64), longer)
    place = below + step
    left = np.maximum(done, edges[place])
    found: NDArray[np.float64] = left + (edges[place + 1] - left) * (at - step)
    if (beyond := place == count).any():  # uniform in the logarithm of the length
        begin = np.maximum(1, left[beyond])
        end = np.maximum(begin, np.broadcast_to(cap, left.shape)[beyond])
        found[beyond] = begin * (end / begin) ** ((at - step)[beyond] / tail)
    if not weight:
        return found
    imagined = np.sqrt(done**2 + (cap**2 - done**2) * np.clip((at - longer - tail) / np.maximum(prior, 1e-9), 0, 1))
    return np.where(at < longer + tail, found, imagined)


def _bounded(lengths: NDArray[np.float64], done: Column, cap: Column) -> Column:
    """One more token comes at least, and no more than `cap`."""
    return np.minimum(np.maximum(np.rint(lengths).astype(np.int64), done + 1), cap)


def distance(left: Column, right: Column) -> float:
    """The largest difference of two empirical distributions, both sorted."""
    both = np.concatenate([left, right])
    shares = (np.searchsorted(side, both, side="right") / len(side) for side in (left, right))
    return float(np.abs(np.subtract(*shares)).max())
