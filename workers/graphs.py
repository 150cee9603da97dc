"""Steps as graphs: for each size one of the forward and one of the drawing (rule J).

A graph replays what was launched when it was captured, on the memory of then. So what it reads lies at fixed places
(arrivals.py), what it writes too, and a step is padded to the next size. What captures is passed in: on a GPU
gpu.Capture, in tests a function that calls the work again.
"""

import bisect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from aiollm.kernels.batch import Sampled
from aiollm.workers.arrivals import Arrivals, Columns
from aiollm.workers.sizes import TOP, Draw, Forward, Size
from aiollm.workers.step import Room

log = logging.getLogger(__name__)

BIASED = 64  # entries of bias for each row that there is room for; a step with more is drawn without a graph

Work = Callable[[], Any]
Capture = Callable[[Work], Work]
Bias = tuple[torch.Tensor, torch.Tensor]  # ids [b] int64, values [b] float32


class Steps(Protocol):
    """What is captured, on columns in their places."""

    def forward(self, columns: Columns, max_new: int, max_length: int) -> torch.Tensor: ...

    def draw(self, columns: Columns, hidden: torch.Tensor, bias: Bias | None, top_n: int) -> Sampled: ...


class Places(NamedTuple):
    """What graphs read and write besides the step's columns."""

    hidden: torch.Tensor  # [tokens, hidden]
    ids: torch.Tensor  # [entries] int64, of the bias
    values: torch.Tensor  # [entries] float32
    drawn: Sampled  # of all rows


class Graphs:
    """Captured sizes; without any, every step finds none. `pending` are still to be captured."""

    def __init__(self, steps: Steps, arrivals: Arrivals, rows: int, max_length: int) -> None:
        self.pending: list[Size] = []
        self._steps = steps
        self._arrivals = arrivals
        self._rows = rows
        self._max_length = max_length
        self._capture: Capture = lambda work: work
        self._top = TOP
        self._replays: dict[Size, Work] = {}
        self._sorted: list[Size] = []
        self._places: Places | None = None

    def __len__(self) -> int:
        return len(self._replays)

    def begin(self, capture: Capture, every: list[Size]) -> None:
        """From now on sizes are captured by `capture`, a forward of the most tokens first. Without it `self.capture`
        only computes them."""
        self._capture, self.pending = capture, list(every)
        self._top = max((size.top_n for size in every if isinstance(size, Draw)), default=TOP)

    def capture(self, size: Size) -> None:
        """Compute a size once, which compiles and allocates what it needs, and capture it. Raises what that raises."""
        self.pending = [other for other in self.pending if other != size]
        self._arrivals.pad(_room(size), self._rows)  # what lies there is the last step's: nobody draws twice
        self._compute(size)
        self._replays[size] = self._capture(lambda: self._compute(size))
        bisect.insort(self._sorted, size, key=_order)

    def capture_next(self) -> None:
        """Capture one that is pending. A size that cannot be had only makes steps slower."""
        size = self.pending[0]
        try:
            self.capture(size)
        except Exception:
            log.exception("%s cannot be captured; it and what is pending will be launched kernel by kernel", size)
            self.pending = []

    def room(self, needs: Room, mixed: bool, top_n: int) -> Room:
        """What a step's columns should hold: the sizes of its graphs, or what it needs where there is no graph."""
        forward, draw = self._next(Forward(mixed, needs.tokens, 0)), self._draw(needs.sampled, top_n)
        sampled = draw.sampled if draw else needs.sampled
        return (_room(forward) if forward else needs)._replace(sampled=sampled)

    def forward(self, room: Room, mixed: bool) -> torch.Tensor | None:
        """Replay the forward of a room; hidden [tokens, h], or None where there is no such graph."""
        replay = self._replays.get(Forward(mixed, room.tokens, room.sequences))
        if replay is None or self._places is None:
            return None
        replay()
        return self._places.hidden[: room.tokens]

    def draw(self, room: Room, hidden: torch.Tensor, bias: Bias | None, top_n: int) -> Sampled | None:
        """Replay the drawing of a room from `hidden`; None where there is no such graph, or too much bias for it."""
        size, places = self._draw(room.sampled, top_n), self._places
        if size is None or size.sampled != room.sampled or places is None:
            return None
        if bias is not None:
            entries = len(bias[0])
            if entries > len(places.ids):
                return None
            places.ids[:entries].copy_(bias[0])
            places.values[:entries].copy_(bias[1])
        if hidden.data_ptr() != places.hidden.data_ptr():
            places.hidden[: len(hidden)].copy_(hidden)
        self._replays[size]()
        return places.drawn

    def _next(self, size: Size) -> Size | None:
        """The smallest captured size of that kind that is not smaller."""
        at = bisect.bisect_left(self._sorted, _order(size), key=_order)
        found = self._sorted[at] if at < len(self._sorted) else None
        return found if found is not None and _order(found)[:2] == _order(size)[:2] else None

    def _draw(self, sampled: int, top_n: int) -> Draw | None:
        found = self._next(Draw(0, sampled)) if top_n <= 0 else None
        found = found or (self._next(Draw(self._top, sampled)) if top_n <= self._top else None)
        return found if sampled and isinstance(found, Draw) else None

    def _compute(self, size: Size) -> None:
        columns = self._arrivals.columns(_room(size))
        if isinstance(size, Forward):
            hidden = self._steps.forward(columns, size.tokens if size.mixed else 1, self._max_length)
            self._placed(hidden).hidden[: size.tokens].copy_(hidden)
            return
        places = self._places
        assert places is not None, "no forward was captured before"
        drawn = self._steps.draw(columns, places.hidden, (places.ids, places.values), size.top_n)
        for place, value in zip(places.drawn, drawn, strict=True):
            place[tuple(slice(end) for end in value.shape)].copy_(value)

    def _placed(self, hidden: torch.Tensor) -> Places:
        """The fixed places; the first forward, of the most tokens, shows what hidden states look like."""
        if self._places is None:
            rows = self._rows
            drawn = Sampled(
                hidden.new_zeros(rows, dtype=torch.int64),
                hidden.new_zeros(rows, dtype=torch.float32),
                hidden.new_zeros((rows, TOP), dtype=torch.int64),
                hidden.new_zeros((rows, TOP), dtype=torch.float32),
            )
            entries = BIASED * rows
            ids, values = hidden.new_zeros(entries, dtype=torch.int64), hidden.new_zeros(entries, dtype=torch.float32)
            self._places = Places(hidden.new_zeros(hidden.shape), ids, values, drawn)
        return self._places


def _room(size: Size) -> Room:
    """That of its own columns."""
    return Room(size.sequences, size.tokens, 0) if isinstance(size, Forward) else Room(0, 0, size.sampled)


def _order(size: Size) -> tuple[str, int, int]:
    return type(size).__name__, int(size[0]), size[1]
