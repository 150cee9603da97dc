"""Frames on a pipe: an 8-byte head (length, flag), then the body, or the body's offset in the arena.

Reading and writing never block unless asked to: `FrameWriter.flush` stops at a full pipe, `FrameReader.read` at an
empty one.
"""

import fcntl
import os
import select
import struct
from collections import deque
from collections.abc import Iterator

from aiollm.wire.arena import Arena

INLINE_LIMIT = 8192  # bytes; larger bodies with a number go through the arena
PIPE_SIZE = 1 << 20
_HEAD = struct.Struct("<II")
_OFFSET = struct.Struct("<Q")
_INLINE, _IN_ARENA = 0, 1


def enlarge(fd: int) -> None:
    """Widen a pipe to PIPE_SIZE where the system lets us; a narrow pipe is only slower."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # the per-user pipe limit is reached


class FrameWriter:
    """Keeps frames in order and writes what the pipe takes."""

    def __init__(self, fd: int, arena: Arena | None = None) -> None:
        self.fd = fd
        self._arena = arena
        self._queue: deque[tuple[int, bytes]] = deque()
        self._partial = b""

    def send(self, body: bytes, number: int = 0) -> None:
        """Queue a body; `number` > 0 allows the arena, whose space comes back when that number is applied."""
        self._queue.append((number, body))

    @property
    def pending(self) -> int:
        """Frames not yet handed to the pipe."""
        return len(self._queue) + bool(self._partial)

    def flush(self) -> bool:
        """Write without blocking; True when nothing is left. Raises BrokenPipeError when the reader is gone.

        False with the arena full means: call again once space was freed.
        """
        while self._partial or self._queue:
            if not self._partial:
                frame = self._frame(*self._queue[0])
                if frame is None:
                    return False
                self._partial = frame
                self._queue.popleft()
            try:
                written = os.write(self.fd, self._partial)
            except BlockingIOError:
                return False
            self._partial = self._partial[written:]
        return True

    def flush_blocking(self) -> None:
        """Write everything, waiting for the reader where the pipe is full."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while not self.flush():
            poll.poll()

    def _frame(self, number: int, body: bytes) -> bytes | None:
        if number == 0 or self._arena is None or len(body) <= INLINE_LIMIT:
            return _HEAD.pack(len(body), _INLINE) + body
        offset = self._arena.put(number, body)
        if offset is None:
            return None
        return _HEAD.pack(len(body), _IN_ARENA) + _OFFSET.pack(offset)


class FrameReader:
    """Cuts a byte stream into frames. Bodies in the arena come as views that live until their number is applied."""

    def __init__(self, fd: int, arena: Arena | None = None) -> None:
        self.fd = fd
        self._arena = arena
        self._buffer = bytearray()
        self.closed = False

    def read(self) -> Iterator[bytes | memoryview]:
        """Whatever whole frames have arrived. Sets `closed` at the end of the stream."""
        while True:
            try:
                data = os.read(self.fd, PIPE_SIZE)
            except BlockingIOError:
                break
            if not data:
                self.closed = True
                break
            self._buffer += data
            yield from self._frames()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the pipe has something to read (or its end); False at the timeout, in seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _frames(self) -> Iterator[bytes | memoryview]:
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            length, flag = _HEAD.unpack_from(self._buffer, at)
            size = length if flag == _INLINE else _OFFSET.size
            begin = at + _HEAD.size
            if len(self._buffer) < begin + size:
                break
            at = begin + size
            if flag == _INLINE:
                yield bytes(self._buffer[begin:at])
            elif self._arena is None:
                raise ValueError("a frame points into an arena that this reader does not have")
            else:
                yield self._arena.view(_OFFSET.unpack_from(self._buffer, begin)[0], length)
        del self._buffer[:at]
