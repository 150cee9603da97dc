"""Admission policies: what is foreseen of the running rows, and whether waiting requests may join them.

A policy opens one `Gauge` for each round of admission; the gauge takes requests in until one does not fit.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from aiollm.engine.admission import Foresight, Newcomer, Sums, View
from aiollm.engine.history import History
from aiollm.engine.rows import Column
from aiollm.engine.window import Window

DRAWN = 1000  # lengths in one round, while there are not more rows


class Gauge(Protocol):
    def join(self, newcomers: Sequence[Newcomer]) -> bool:
        """Take requests in, all of them or none."""


class Policy(Protocol):
    """`history` learns from finished requests, whether the policy uses it or not."""

    history: History

    def open(self, view: View) -> Gauge:
        """What is foreseen of the running rows."""

    def worst(self, view: View) -> int:
        """Slots foreseen to be in use at the worst moment if nobody joins."""


def _most(held: Column | int, known: Column | int, steps: Column | int, window: Window) -> int:
    """All that rows may ever use which take so many steps more."""
    steps = np.maximum(0, steps)
    return int(np.sum(held + steps + window.growth(known, steps)))


class Conservative:
    """Every request gets all that it may ever use, so nobody is paused; most of it stays unused."""

    def __init__(self) -> None:
        self.history = History()

    def open(self, view: View) -> Sums:
        return Sums(
            self.worst(view), view.slots,
            lambda new: new.shared + _most(new.held, new.known, new.cap - new.done - 1, view.window),
        )  # fmt: skip

    def worst(self, view: View) -> int:
        return view.shared + _most(view.held, view.known, view.cap - view.done - 1, view.window)


class Aggressive:
    """Whatever fits now joins, up to a watermark; rows that do not fit later are paused."""

    def __init__(self, watermark: float = 0.99) -> None:
        self.history = History()
        self._watermark = watermark

    def open(self, view: View) -> Sums:
        return Sums(view.used, self._watermark * view.slots, lambda new: new.held + new.shared)

    def worst(self, view: View) -> int:
        return view.used


class PastFuture:
    """Lengths are drawn from those of finished requests, several times; the largest of the peaks counts.

    Rows are drawn independently, as their lengths are. Few rows are drawn more often than many: their errors weigh
    more, and a draw costs less.
    """

    def __init__(self, reserve: float = 0.0075, draws: int = 20, seed: int = 0) -> None:
        self.history = History()
        self._reserve, self._draws = reserve, draws
        self._random = np.random.default_rng(seed)

    def open(self, view: View) -> Foresight:
        draws = min(self._draws, max(1, DRAWN // max(1, len(view.held))))
        self.history.observe(view.kind, view.done)
        return Foresight(view, self._totals(view, draws), self._reserve, lambda new: self._newcomer(new, draws))

    def worst(self, view: View) -> int:
        return self.open(view).worst()

    def _totals(self, view: View, draws: int) -> Column:
        """Output lengths, [draws, n]; those that are certain are max_tokens."""
        count = len(view.held)
        if view.certain.all():
            return np.broadcast_to(view.cap, (draws, count))
        chances = self._random.random((draws, count))
        drawn = self.history.draw(view.kind, view.done, view.cap, chances)
        return np.where(view.certain, view.cap, drawn) if view.certain.any() else drawn

    def _newcomer(self, new: Newcomer, draws: int) -> Column:
        if new.certain:
            return np.full(draws, new.cap)
        kind, done, cap = np.array([[new.kind], [new.done], [new.cap]])
        return self.history.draw(kind, done, cap, self._random.random((draws, 1)))[:, 0]


class LightLLM:
    """The rule of LightLLM 1.1's release: while less than `token_ratio` of the pool is in use, an output is taken to be
    as long as 1.1 times what is there, `new_tokens` at least; else as long as max_tokens allows."""

    MARGIN = 16  # tokens for each row, which it adds for the steps under way

    def __init__(self, token_ratio: float = 0.0, new_tokens: int = 1024) -> None:
        self.history = History()
        self._token_ratio, self._new_tokens = token_ratio, new_tokens

    def open(self, view: View) -> Foresight:
        busy = view.used >= self._token_ratio * view.slots

        def totals(done: Column, cap: Column, certain: np.ndarray) -> Column:
            guess = np.minimum(cap, np.maximum((1.1 * done).astype(np.int64), self._new_tokens))
            return np.where(certain | busy, cap, guess) + self.MARGIN

        def newcomer(new: Newcomer) -> Column:
            return totals(np.array([new.done]), np.array([new.cap]), np.array([new.certain]))

        return Foresight(view, totals(view.done, view.cap, view.certain)[None], 0.0, newcomer)

    def worst(self, view: View) -> int:
        return self.open(view).worst()
