"""Where a step's columns lie on the device."""

import functools

import torch

from aiollm.workers.staging import Place, Staged, views
from aiollm.workers.step import Room, computing, drawing

Columns = dict[str, torch.Tensor]


class Arrivals:
    """Columns at places that depend on the room alone, so that a graph finds them where it was captured.

    What names the drawing ends where what names the computing begins: one copy brings both, and a step may be computed
    by the graph of one size and sampled by that of another.
    """

    def __init__(self, most: Room, device: torch.device) -> None:
        self._device = device
        self._middle = _end(drawing(most))
        self._buffer = torch.zeros(self._middle + _end(computing(most)), dtype=torch.int64, device=device)
        self.columns = functools.lru_cache(maxsize=256)(self._columns)  # they take 40 us to make

    @property
    def size(self) -> int:
        """Words of the largest step's columns."""
        return len(self._buffer)

    def _columns(self, room: Room) -> Columns:
        """The columns of a step that has this room."""
        before = self._buffer[self._middle - _end(drawing(room)) : self._middle]
        return views(before, drawing(room)) | views(self._buffer[self._middle :], computing(room))

    def pad(self, room: Room, hold: int) -> Columns:
        """Fill the columns of a room as `step.columns` pads: nobody's row changes where they are computed."""
        columns = self.columns(room)
        for name, column in columns.items():
            column.fill_(hold if name.endswith("rows") else 0)
        return columns

    def take(self, staged: Staged, room: Room) -> Columns:
        """Copy a step's columns to their places; the value is what came besides, in memory of its own.

        Raises ValueError where the step has more than there is room for.
        """
        first, length = self._middle - _end(drawing(room)), _end(drawing(room)) + _end(computing(room))
        if first < 0 or first + length > len(self._buffer):
            raise ValueError(f"a step of {room} is larger than any that was announced")
        self._buffer[first : first + length].copy_(staged.buffer[:length], non_blocking=True)
        rest = staged.buffer[length:].to(self._device, non_blocking=True)
        others = {
            name: Place(place.begin - length, place.length, place.dtype)
            for name, place in staged.places.items()
            if place.begin >= length
        }
        return views(rest, others)


def _end(places: dict[str, Place]) -> int:
    return max(place.end for place in places.values())
