"""What an iteration brings for all rows at once, done a few at a time: the event loop looks around in between."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

SLICE = 32  # done before the loop looks at what else happened; one or two milliseconds


class Turns(Generic[T]):
    """Things to do something about, in the order in which they came. To be used in one event loop."""

    def __init__(self, act: Callable[[list[T]], None]) -> None:
        self._act = act
        self._due: deque[T] = deque()

    def add(self, thing: T) -> None:
        """Have `act` look at it before the loop waits again, and behind whatever this turn still brings."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._some)
        self._due.append(thing)

    def _some(self) -> None:
        due = [self._due.popleft() for _ in range(min(SLICE, len(self._due)))]
        if self._due:
            asyncio.get_running_loop().call_soon(self._some)
        self._act(due)


def wake(events: list[asyncio.Event]) -> None:
    """Each of them a task: 2,500 in one pass of the loop held up the rest for 150 ms of a slow core."""
    for event in events:
        event.set()
