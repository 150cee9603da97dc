"""The life of a worker's device as a trace, for ui.perfetto.dev or chrome://tracing; `aiollm trace FILE` sums it up.

Three tracks: what the device did (iterations, gaps, times without work), the updates that were sent to it, and when the
results arrived. Device times are those of the result headers (rule C), laid end to end: an iteration ends when its
result arrived at the latest, and is drawn shorter than it was where it would overlap the one before. Arrows lead from
an update to the iteration that applied it. What an iteration waited for its masks counts among the gap before it.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from aiollm.wire.columns import ints
from aiollm.wire.messages import Failed, Result, Update

log = logging.getLogger(__name__)

DEVICE, SENT, RECEIVED = 1, 2, 3  # tracks
TRACKS = {DEVICE: "device", SENT: "updates sent", RECEIVED: "results received"}
TAIL = b"\n]\n"
DRIFT_US = 200_000.0  # headers have whole microseconds; so much of what they cut off is put right at once
UPDATE_US = 1.0  # drawn length of what has none


class TraceFile:
    """A JSON array of events that is whole after every `add`: what ends it is overwritten by what comes next."""

    def __init__(self, path: str, first: dict[str, Any]) -> None:
        """Raises OSError where the file cannot be written."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        head = b"[\n" + msgspec.json.encode(first)
        os.pwrite(self._fd, head + TAIL, 0)
        self._end = len(head)
        """Where the tail begins."""

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        """Append events. On a full disk the trace ends, and the server goes on."""
        if self._fd < 0:
            return
        body = b"".join([b",\n" + msgspec.json.encode(event) for event in events])
        try:
            written = os.pwrite(self._fd, body + TAIL, self._end)
            if written < len(body) + len(TAIL):
                raise OSError("the disk is full")
            self._end += len(body)
        except OSError as error:
            log.error("the trace ends here: %s", error)
            os.ftruncate(self._fd, self._end)
            os.pwrite(self._fd, TAIL, self._end)
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class _Sent(NamedTuple):
    """An update that no result has told of yet."""

    number: int
    admit: Sequence[tuple[int, int]]
    """(row, generation)."""
    retire: Sequence[int]
    tokens: int
    """Prompt tokens of its chunks."""


class Tracer:
    """Told of every update and every result, in order."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError where the file cannot be written."""
        self._clock, self._start = clock, clock()
        self._file = TraceFile(path, _named("process_name", 0, "aiollm"))
        self._file.add([_named("thread_name", track, name) for track, name in TRACKS.items()])
        self._epoch = 0
        self._ended = 0.0
        self._sent: deque[_Sent] = deque()
        self._known: dict[int, int] = {}
        """Row -> generation, of rows that the worker knows and has not finished: idle time beside them is a gap."""

    def begin(self, epoch: int, rows: Mapping[int, int] = MappingProxyType({})) -> None:
        """A group of workers that knows these rows, with their generations: nothing that was sent before counts."""
        self._epoch, self._ended = epoch, 0.0
        self._sent.clear()
        self._known = dict(rows)

    def sent(self, update: Update, size: int) -> None:
        """An update of so many bytes is on its way."""
        retire = ints(update.retire).tolist()
        counts = ints(update.chunk_counts)
        tokens = int(counts.sum())
        self._sent.append(
            _Sent(update.number, [(admit.row, admit.generation) for admit in update.admit], retire, tokens)
        )
        args = {
            "number": update.number, "bytes": size, "admitted": len(update.admit), "retired": len(retire),
            "slots": len(update.slots.values) // 4, "chunks": len(counts), "chunk_tokens": tokens,
        }  # fmt: skip
        now = self._now()
        flow = {"ph": "s", "cat": "update", "name": "applied", "id": self._id(update.number)}
        self._file.add([_slice(SENT, f"update {update.number}", now, UPDATE_US, args), _on(SENT, now, flow)])

    def received(self, message: Result | Failed) -> None:
        """An iteration was published."""
        header = message.header
        if header.epoch != self._epoch:
            return
        now = self._now()
        before, ended = self._ended, self._ended + header.idle_us + header.device_us
        if not before or ended > now or now - ended > DRIFT_US:
            ended = now
        self._ended = ended
        began = max(before, ended - header.device_us)
        busy = bool(self._known)
        applied, tokens = self._apply(header.applied)
        rows, generations = ints(message.rows).tolist(), ints(message.generations).tolist()
        if isinstance(message, Result):
            self._finish(rows, generations, message.hints)
        stalled = len(header.stalled) // 4
        args: dict[str, Any] = {
            "iteration": header.iteration, "epoch": header.epoch, "applied": header.applied, "rows": len(rows),
            "chunk_tokens": tokens, "stalled": stalled, "device_us": header.device_us,
            "gap_us": header.idle_us if busy else 0, "no_work_us": 0 if busy else header.idle_us,
        }  # fmt: skip
        if isinstance(message, Failed):
            args["error"] = message.error
        events = [_slice(DEVICE, _name(message, len(rows), tokens), began, ended - began, args)]
        if header.idle_us:
            idled = max(before, began - header.idle_us)
            name = "gap" if busy else "no work"
            events.append(_slice(DEVICE, name, idled, began - idled, {"before": header.iteration}))
        for number in applied:
            flow = {"ph": "f", "bp": "e", "cat": "update", "name": "applied", "id": self._id(number)}
            events.append(_on(DEVICE, began, flow))
        late = {"iteration": header.iteration, "behind_device_us": round(now - ended)}
        events.append(_slice(RECEIVED, f"result {header.iteration}", now, UPDATE_US, late))
        self._file.add(events)

    def close(self) -> None:
        self._file.close()

    def _apply(self, upto: int) -> tuple[list[int], int]:
        """The updates that an iteration applied, and the prompt tokens that they brought."""
        numbers, tokens = [], 0
        while self._sent and self._sent[0].number <= upto:
            update = self._sent.popleft()
            for row in update.retire:
                self._known.pop(row, None)
            self._known.update(update.admit)
            numbers.append(update.number)
            tokens += update.tokens
        return numbers, tokens

    def _finish(self, rows: Sequence[int], generations: Sequence[int], hints: bytes) -> None:
        """Rows that are at their end have no work, though the server has not retired them yet."""
        for at in np.flatnonzero(np.frombuffer(hints, np.uint8)).tolist():
            if self._known.get(rows[at]) == generations[at]:
                del self._known[rows[at]]

    def _id(self, number: int) -> str:
        return f"{self._epoch}.{number}"

    def _now(self) -> float:
        return (self._clock() - self._start) * 1e6


def _name(message: Result | Failed, rows: int, tokens: int) -> str:
    if isinstance(message, Failed):
        return f"failed {rows}"
    if not tokens:
        return f"decode {rows}"
    return f"mixed {rows} + {tokens}" if rows else f"prefill {tokens}"


def _on(track: int, at: float, event: dict[str, Any]) -> dict[str, Any]:
    """An event at a time in microseconds."""
    return {"pid": 1, "tid": track, "ts": round(at, 1)} | event


def _slice(track: int, name: str, at: float, duration: float, args: dict[str, Any]) -> dict[str, Any]:
    return _on(track, at, {"ph": "X", "name": name, "dur": round(duration, 1), "args": args})


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": track, "name": what, "args": {"name": name}}
