"""Frames on a pipe: an 8-byte head (length, flag), then the body, or the body's offset in the arena.

Reading and writing never block unless asked to: `FrameWriter.flush` stops at a full pipe, `FrameReader.read` takes
what one read brings.
"""

import fcntl
import os
import select
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from aiollm.wire.arena import Arena

INLINE_LIMIT = 8192  # bytes; larger bodies with a number go through the arena, unless they exceed it
PIPE_SIZE = 1 << 20
_HEAD = struct.Struct("<II")
_OFFSET = struct.Struct("<Q")
_INLINE, _IN_ARENA = 0, 1


def enlarge(fd: int) -> None:
    """Widen a pipe to PIPE_SIZE where the system lets us; a narrow pipe is only slower."""
    with suppress(OSError):  # the user's limit is reached
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)


class FrameWriter:
    """Keeps frames in order and writes what the pipe takes."""

    def __init__(self, fd: int, arena: Arena | None = None) -> None:
        self.fd = fd
        self._arena = arena
        self._queue: deque[tuple[int, bytes]] = deque()
        self._partial = memoryview(b"")

    def send(self, body: bytes, number: int = 0) -> None:
        """Queue a body; `number` > 0 allows the arena, whose space comes back when that number is applied."""
        self._queue.append((number, body))

    @property
    def pending(self) -> int:
        """Frames not yet handed to the pipe."""
        return len(self._queue) + bool(self._partial)

    def flush(self) -> bool:
        """Write without blocking; True when the pipe is full. Raises BrokenPipeError when the reader is gone.

        False with something `pending` means that the arena is full: call again once space was freed.
        """
        while self._partial or self._queue:
            if not self._partial:
                frame = self._frame(*self._queue[0])
                if frame is None:
                    return False
                self._partial = memoryview(frame)
                self._queue.popleft()
            try:
                written = os.write(self.fd, self._partial)
            except BlockingIOError:
                return True
            self._partial = self._partial[written:]
        return False

    def flush_blocking(self) -> None:
        """Write everything, waiting for the reader where the pipe is full."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self.flush():
            poll.poll()

    def _frame(self, number: int, body: bytes) -> bytes | None:
        if number == 0 or self._arena is None or not INLINE_LIMIT < len(body) <= self._arena.size:
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
        """The whole frames among what has arrived, one read's worth; a caller that stops early finds the others at the
        next call. Sets `closed` at the end of the stream."""
        try:
            data = os.read(self.fd, PIPE_SIZE)
        except BlockingIOError:
            data = None
        self.closed = data == b""
        self._buffer += data or b""
        while (frame := self._frame()) is not None:
            yield frame

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the pipe has something to read (or its end); False at the timeout, in seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _frame(self) -> bytes | memoryview | None:
        """Take the first frame off the buffer, if it is whole."""
        if len(self._buffer) < _HEAD.size:
            return None
        length, flag = _HEAD.unpack_from(self._buffer)
        end = _HEAD.size + (length if flag == _INLINE else _OFFSET.size)
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_HEAD.size : end])
        del self._buffer[:end]
        if flag == _INLINE:
            return body
        if self._arena is None:
            raise ValueError("a frame points into an arena that this reader does not have")
        return self._arena.view(_OFFSET.unpack(body)[0], length)
