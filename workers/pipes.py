"""A worker's ends of the wire: updates in, results out."""

import threading
from collections import deque
from collections.abc import Iterator

from aiollm.wire.framing import FrameReader, FrameWriter
from aiollm.wire.messages import (
    Failed,
    FromWorker,
    Result,
    ToWorker,
    encoder,
    to_worker_decoder,
)


class PipeInbox:
    """Messages of the server, in order. Its end means that the server is gone."""

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader

    def drain(self) -> Iterator[ToWorker]:
        for body in self._reader.read():
            yield to_worker_decoder.decode(body)

    def quiet(self, seconds: float) -> bool:
        return not self._reader.closed and not self._reader.wait(seconds)

    def wait(self) -> bool:
        if self._reader.closed:
            return False
        self._reader.wait()
        return True


class PipeOutbox:
    """Messages to the server, in the order of `put`, whichever thread flushes. Only rank 0 reports iterations."""

    def __init__(self, writer: FrameWriter, speaks: bool = True) -> None:
        self._writer = writer
        self._speaks = speaks
        self._lock = threading.Lock()
        self._waiting: deque[FromWorker] = deque()

    def put(self, message: FromWorker) -> None:
        if self._speaks or not isinstance(message, Result | Failed):
            self._waiting.append(message)

    def offer(self) -> None:
        if self._lock.acquire(blocking=False):  # else the other thread is writing, and this one will when it flushes
            try:
                self._encode()
                self._writer.flush()
            finally:
                self._lock.release()

    def flush(self) -> None:
        with self._lock:
            self._encode()
            self._writer.flush_blocking()

    def _encode(self) -> None:
        while self._waiting:
            self._writer.send(encoder.encode(self._waiting.popleft()))
