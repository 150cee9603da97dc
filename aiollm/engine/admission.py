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
from aiollm.engine.window import Window


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
    window: Window = Window()


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

    Newcomers are sorted in one by one, which is linear in n.
    """

    def __init__(self, held: Column, steps: Column) -> None:
        order = np.argsort(-steps, axis=1, kind="stable")
        draws = np.arange(len(steps))[:, None]
        self._steps = steps[draws, order]
        held = held[order] if held.ndim == 1 else held[draws, order]
        self._alive = np.arange(1, steps.shape[1] + 1) * self._steps + np.cumsum(held, axis=1)
        self._places = order
        self._extra = 0

    def worst(self) -> int:
        """Slots in use at the worst moment of any draw, without those that are shared."""
        return int(self._alive.max(initial=0))

    def share(self, place: int, slots: int) -> None:
        """Row `place` no longer frees these: until it ends they are counted with the shared ones from now on."""
        before = np.cumsum(self._places == place, axis=1) == 0
        self._alive += np.where(before, slots, 0)  # while the row is there, it and the shared ones make no difference
        self._extra += slots

    def worst_with(self, held: Column, steps: Column) -> int:
        """`with_one(...).worst()` at a fraction of its cost."""
        most = 0
        for mine, alive, own, step in zip(self._steps, self._alive, held.tolist(), steps.tolist(), strict=True):
            at = len(mine) - int(np.searchsorted(mine[::-1], step))
            above = int(alive[at - 1]) - at * int(mine[at - 1]) if at else self._extra
            most = max(most, (at + 1) * step + above + own, int(alive[:at].max(initial=0)))
            if at < len(mine):
                most = max(most, int((alive[at:] + mine[at:]).max()) + own)
        return most

    def with_one(self, held: Column, steps: Column) -> "Peaks":
        """The same with one row more; `held` and `steps` [draws]."""
        draws, count = self._steps.shape
        joined = Peaks.__new__(Peaks)
        joined._extra = self._extra
        joined._steps, joined._alive, joined._places = (np.empty((draws, count + 1), np.int64) for _ in range(3))
        for draw in range(draws):
            mine, alive, own, step = self._steps[draw], self._alive[draw], int(held[draw]), int(steps[draw])
            at = len(mine) - int(np.searchsorted(mine[::-1], step))  # behind those that take as long
            above = (
                int(alive[at - 1]) - at * int(mine[at - 1]) if at else self._extra
            )  # what the rows before it hold now
            for column, old, new in (
                (joined._steps, mine, step),
                (joined._places, self._places[draw], count),
                (joined._alive, alive, (at + 1) * step + above + own),
            ):
                column[draw, :at], column[draw, at], column[draw, at + 1 :] = old[:at], new, old[at:]
            joined._alive[draw, at + 1 :] += mine[at:] + own
        return joined


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
        mass = view.known + steps.sum(axis=0) / len(steps)
        self._mass = float(mass.sum())
        self._guessed = self._mass - float(mass @ view.certain)

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
