"""What comes for many at once, done a few at a time: the event loop looks around in between."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from aiohttp import web

T = TypeVar("T")

SLICE = 32  # done before the loop looks at what else happened; one or two milliseconds
FEW = 8  # requests that begin in between: each takes up to half a millisecond


class Turns(Generic[T]):
    """Things to do something about, in the order in which they came. To be used in one event loop."""

    def __init__(self, act: Callable[[list[T]], None], most: int = SLICE) -> None:
        """`act` is given up to `most` of them."""
        self._act, self._most = act, most
        self._due: deque[T] = deque()

    def add(self, thing: T) -> None:
        """Have `act` look at it before the loop waits again, and behind whatever this turn still brings."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._some)
        self._due.append(thing)

    def _some(self) -> None:
        due = [self._due.popleft() for _ in range(min(self._most, len(self._due)))]
        if self._due:
            asyncio.get_running_loop().call_soon(self._some)
        self._act(due)


def wake(events: list[asyncio.Event]) -> None:
    """Each of them a task: 2,500 in one pass of the loop held up the rest for 150 ms of a slow core."""
    for event in events:
        event.set()


class Starts(Turns[asyncio.Event]):
    """Those who are about to begin something: where a thousand clients ask at once, streams go on meanwhile."""

    def __init__(self) -> None:
        super().__init__(wake, FEW)

    async def turn(self) -> None:
        """Wait for one's turn."""
        event = asyncio.Event()
        self.add(event)
        await event.wait()


STARTS: web.AppKey[Starts] = web.AppKey("starts", Starts)
