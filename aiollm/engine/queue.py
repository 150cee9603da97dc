"""Who is next: the waiting requests in order.

Requests that ran before (paused, or their worker died) come first, oldest first: they hold streams open. The others
stand in lanes, each a heap by a key that never changes while a request waits, so that nobody waits for ever: a step of
priority is worth PRIORITY_SECONDS of waiting, and whoever comes later than that is behind.

    fcfs      one lane, by arrival and priority
    fair      a lane for each API key; the lane that was served least is next (virtual token counter, Sheng et al.,
              OSDI 2024, arXiv 2401.00588): prompt tokens count once, output tokens twice
    deadline  one lane, by the time until which the client wants its first token
    sla       as deadline, with one target for all; requests that cannot meet it any more count as if they had come
              LATE_SECONDS later, since nobody gains from their being served first
"""

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np

from aiollm.engine.request import Request

Order = Literal["fcfs", "fair", "deadline", "sla"]

PRIORITY_SECONDS = 10.0  # of waiting, for one step of priority
LATE_SECONDS = 60.0
OUTPUT_WEIGHT = 2  # an output token costs that many prompt tokens, as in the paper


def seniority(request: Request) -> tuple[float, int]:
    """Arrival on a clock on which priority is time, and the order of equals; smaller is more senior."""
    return request.arrived + PRIORITY_SECONDS * request.priority, request.serial


class Entry:
    """A request in a heap; `request` is None once it left by another way than as the first."""

    __slots__ = ("key", "serial", "request", "lane")

    def __init__(self, key: float, request: Request, lane: "Lane") -> None:
        self.key, self.serial, self.lane = key, request.serial, lane
        self.request: Request | None = request

    def __lt__(self, other: "Entry") -> bool:
        return (self.key, self.serial) < (other.key, other.serial)


class Lane:
    """A heap of entries, at most half of them dead."""

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self._dead = 0

    def first(self) -> Entry | None:
        while self.heap and self.heap[0].request is None:
            heapq.heappop(self.heap)
            self._dead -= 1
        return self.heap[0] if self.heap else None

    def kill(self, entry: Entry) -> None:
        entry.request = None
        self._dead += 1
        if 2 * self._dead > len(self.heap):
            self.heap = [entry for entry in self.heap if entry.request is not None]
            heapq.heapify(self.heap)
            self._dead = 0


class Queue:
    """`tokens` are the known tokens of all that wait."""

    def __init__(self, order: Order = "fair", target: float = 10.0, timeout: float = 0.0) -> None:
        """`target` is the time to the first token that `sla` wants for all, and `deadline` for those without one.
        After `timeout` a request that never ran `expired`; 0 is never."""
        self.order = order
        self.tokens = 0
        self._target, self._timeout = target, timeout
        self._serial = count()
        self._entries: dict[int, Entry] = {}  # by id() of the request
        self._returned, self._late = Lane(), Lane()
        self._lanes: list[Lane] = [Lane()]
        self._numbers = {"": 0}
        self.served = np.zeros(1)
        """Virtual tokens by lane."""
        self._waiting = [0]  # requests by lane
        self._expiries: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """In the order of their keys, lane by lane."""
        for lane in (self._returned, *self._lanes, self._late):
            yield from (entry.request for entry in sorted(lane.heap) if entry.request is not None)

    @property
    def returned(self) -> Iterator[Request]:
        """Those that ran before."""
        return (entry.request for entry in sorted(self._returned.heap) if entry.request is not None)

    def lane(self, request: Request) -> int:
        """The number under which a request's tokens are counted: that of its API key."""
        number = self._numbers.get(request.key)
        if number is None:
            number = self._numbers[request.key] = len(self._lanes)
            self._lanes.append(Lane())
            self._waiting.append(0)
            self.served = np.append(self.served, 0.0)
        return number

    def waiting(self, key: str) -> int:
        """Requests of an API key that wait."""
        return self._waiting[self._numbers[key]] if key in self._numbers else 0

    def push(self, request: Request) -> None:
        """Queue a request that never ran, or one that did."""
        lane = self.lane(request)
        if request.serial < 0:
            request.serial = next(self._serial)
        if not self._waiting[lane] and any(self._waiting):  # who was away has saved nothing up
            self.served[lane] = max(self.served[lane], self.served[np.array(self._waiting) > 0].min())
        self._waiting[lane] += 1
        self.tokens += request.known
        ran = request.admitted is not None
        if ran:
            self._enter(self._returned, seniority(request)[0], request)
        else:
            self._enter(self._lanes[lane if self.order == "fair" else 0], self._key(request), request)
            if limits := [limit for limit in (request.patience, self._timeout or None) if limit is not None]:
                heapq.heappush(self._expiries, (request.arrived + min(limits), request.serial, request))

    @property
    def next_expiry(self) -> float | None:
        """When `expired` has something to tell at the earliest."""
        while self._expiries and not self._may_expire(self._expiries[0][2]):
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def expired(self, now: float) -> Iterator[Request]:
        """Requests that waited for as long as they or the queue allow, and never ran; to be removed one by one."""
        while (expiry := self.next_expiry) is not None and expiry <= now:
            yield heapq.heappop(self._expiries)[2]

    def _may_expire(self, request: Request) -> bool:
        return id(request) in self._entries and request.admitted is None

    def remove(self, request: Request) -> None:
        """Take a request out, from wherever it stands; KeyError where it does not wait."""
        entry = self._entries.pop(id(request))
        entry.lane.kill(entry)
        self._waiting[self.lane(request)] -= 1
        self.tokens -= request.known

    def head(self, now: float) -> Request | None:
        """The next one to run."""
        if (first := self._returned.first()) is not None:
            return first.request
        lane = self._lanes[0]
        if self.order == "fair":
            busy = [number for number, n in enumerate(self._waiting) if n]
            if not busy:
                return None
            lane = self._lanes[min(busy, key=lambda number: self.served[number])]
        first = lane.first()
        if self.order == "sla":
            while first is not None and first.request is not None and first.request.arrived + self._target < now:
                heapq.heappop(lane.heap)
                self._enter(self._late, first.key + LATE_SECONDS, first.request)
                first = lane.first()
            first = min((entry for entry in (first, self._late.first()) if entry is not None), default=None)
        return first.request if first is not None else None

    def serve(self, request: Request, tokens: int) -> None:
        """Count prompt tokens that are computed for a request."""
        self.served[self.lane(request)] += tokens

    def _key(self, request: Request) -> float:
        key = seniority(request)[0]
        if self.order == "deadline" and request.patience is not None:
            return key + request.patience
        return key if self.order in ("fcfs", "fair") else key + self._target

    def _enter(self, lane: Lane, key: float, request: Request) -> None:
        entry = self._entries[id(request)] = Entry(key, request, lane)
        heapq.heappush(lane.heap, entry)
