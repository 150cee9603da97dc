"""Who may join: how much KV memory a set of rows will need at its worst moment.

The peak formula of the Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150): sort rows by the steps they
still take; just before row i finishes, rows 1..i are alive and each has grown by b_i. So

    peak = max_i (i * b_i + sum_{j <= i} a_j),    a = slots held now, b = steps to come

A row whose prompt is still being computed begins to grow `delay` steps later: a is smaller and b longer by that much.
What layers with a window take of a row until it is as long as the window counts with `a` from the beginning.
Slots that several rows hold are counted once, and as if they stayed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aiollm.engine.rows import Column
from aiollm.engine.window import NO_WINDOW, Window

NEVER = 1 << 40  # steps; what nobody takes


class View(NamedTuple):
    """The running rows in columns of one length; see rows.Table. Sizes are slots."""

    held: Column
    """What goes when the row ends, all its known tokens counted as computed, and credit left out."""
    done: Column
    """Output tokens so far."""
    known: Column
    cap: Column
    kind: Column
    certain: np.ndarray
    delay: Column
    """Steps until the row decodes."""
    shared: int
    """In use whoever ends."""
    used: int
    """In use now or as soon as all known tokens are computed; credit counts."""
    slots: int
    window: Window = NO_WINDOW


class Newcomer(NamedTuple):
    """What a waiting request would bring; the same fields."""

    held: int
    done: int
    known: int
    cap: int
    kind: int
    certain: bool
    delay: int
    shared: int = 0
    """Of several newcomers with one prompt, what stays until the last of them ends; the first one brings it."""
    owners: tuple[tuple[int, int], ...] = ()
    """(place in the view, slots) of what one running row holds alone so far, and this request would share."""


class Sums:
    """A gauge that adds up: `need` says how much of `limit` a newcomer takes, whatever the others do."""

    def __init__(self, total: int, limit: float, need: Callable[[Newcomer], int]) -> None:
        self._total, self._limit, self._need = total, limit, need

    def join(self, newcomers: Sequence[Newcomer]) -> bool:
        """Take requests in, all of them or none."""
        total = self._total + sum(map(self._need, newcomers))
        if total > self._limit:
            return False
        self._total = total
        return True


class Peaks:
    """The peak formula over several draws of the steps to come: `held` [n] or [draws, n], `steps` [draws, n].

    Columns are the moments before a row ends, those of the longest first; before them stands one in which nobody is
    there, so that every row has one before its own. Newcomers are put in one by one, which is linear in n.
    """

    def __init__(self, held: Column, steps: Column) -> None:
        draws, count = steps.shape
        order = np.argsort(-steps, axis=1)  # of rows that end together the order makes no difference
        draw = np.arange(draws)[:, None]
        held = held[order] if held.ndim == 1 else held[draw, order]
        self._steps, self._alive, self._places = (np.empty((draws, count + 1), np.int64) for _ in range(3))
        self._steps[:, 0], self._alive[:, 0], self._places[:, 0] = NEVER, 0, -1
        self._places[:, 1:] = order
        self._steps[:, 1:] = steps[draw, order]
        self._alive[:, 1:] = np.arange(1, count + 1) * self._steps[:, 1:] + np.cumsum(held, axis=1)

    def worst(self) -> int:
        """Slots in use at the worst moment of any draw, without those that are shared."""
        return int(self._alive.max())

    def share(self, place: int, slots: int) -> None:
        """Row `place` no longer frees these: until it ends they are counted with the shared ones from now on."""
        before = np.cumsum(self._places == place, axis=1) == 0
        self._alive += np.where(before, slots, 0)  # while the row is there, it and the shared ones make no difference

    def worst_with(self, held: Column, steps: Column) -> int:
        """`with_one(...).worst()` at a fraction of its cost."""
        _, own, others = self._with(held, steps)
        return max(int(own.max()), int(others.max()))

    def with_one(self, held: Column, steps: Column) -> "Peaks":
        """The same with one row more; `held` and `steps` [draws]."""
        at, own, others = self._with(held, steps)
        draws, width = others.shape
        columns, draw = np.arange(width + 1), np.arange(draws)
        old = np.minimum(columns - (columns > at[:, None]), width - 1) + draw[:, None] * width
        joined = Peaks.__new__(Peaks)
        joined._steps, joined._alive, joined._places = (
            column.take(old) for column in (self._steps, others, self._places)
        )
        joined._steps[draw, at], joined._alive[draw, at], joined._places[draw, at] = steps, own, width - 1
        return joined

    def _with(self, held: Column, steps: Column) -> tuple[Column, Column, Column]:
        """Where a newcomer stands in each draw, behind those that take as long; slots in use before it ends, and before
        the others do."""
        sooner = self._steps < steps[:, None]
        at = self._steps.shape[1] - sooner.sum(axis=1)
        last = np.arange(len(at)), at - 1
        own = self._alive[last] - last[1] * self._steps[last] + at * steps + held
        return at, own, self._alive + sooner * (self._steps + held[:, None])


class Foresight:
    """A gauge by the peak formula: `totals` [draws, n] are the output lengths foreseen of the running rows, and
    `foresee` gives those of a newcomer, [draws].

    `reserve` is the share of the pool that is kept free for errors of prediction, in proportion to how much of what is
    foreseen belongs to rows whose length is not certain. A request that was paused comes back when so much is free
    twice over: it would be the first to be paused again.
    """

    def __init__(self, view: View, totals: Column, reserve: float, foresee: Callable[[Newcomer], Column]) -> None:
        steps = np.maximum(0, totals - view.done - 1)  # the last token needs no slot
        self._slots, self._shared, self._used, self._window = view.slots, view.shared, view.used, view.window
        held = view.held + view.window.growth(view.known, steps)
        self._peaks = Peaks(held - view.delay, steps + view.delay)
        self._reserve, self._foresee = reserve, foresee
        self._mass = self._guessed = float(view.known.sum()) + float(steps.sum()) / len(steps)
        if view.certain.any():
            self._guessed -= float((view.known + steps.mean(axis=0)) @ view.certain)

    def worst(self) -> int:
        """Slots in use at the worst moment if nobody joins."""
        return max(self._used, self._shared + self._peaks.worst())

    def join(self, newcomers: Sequence[Newcomer]) -> bool:
        """Take requests in, all of them or none."""
        used, mass, guessed, again = self._used, self._mass, self._guessed, False
        shared = self._shared + sum(new.shared for new in newcomers)
        steps = [np.maximum(0, self._foresee(new) - new.done - 1) for new in newcomers]
        held = [
            np.full(len(left), new.held - new.delay, np.int64) + self._window.growth(new.known, left)
            for new, left in zip(newcomers, steps, strict=True)
        ]
        for new, left in zip(newcomers, steps, strict=True):
            share = new.known + float(left.sum()) / len(left)
            used += new.held + new.shared
            mass += share
            guessed += 0 if new.certain else share
            again |= new.done > 0
        limit = self._slots * (1 - (1 + again) * self._reserve * guessed / max(1.0, mass))
        least = shared + self._peaks.worst_with(held[0], steps[0] + newcomers[0].delay)
        if max(used, least) > limit:  # one look tells of most that do not fit
            return False
        peaks = self._peaks
        for new, own, left in zip(newcomers, held, steps, strict=True):
            peaks = peaks.with_one(own, left + new.delay)
            for place, slots in new.owners:
                peaks.share(place, slots)
        if shared + peaks.worst() > limit:
            return False
        self._peaks, self._shared, self._used, self._mass, self._guessed = peaks, shared, used, mass, guessed
        return True


def peak(held: Column, steps: Column) -> int:
    """The peak of one draw."""
    return Peaks(held, steps[None]).worst()
