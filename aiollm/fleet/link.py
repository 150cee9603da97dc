"""One worker process and the server's ends of its wire. Never blocks the event loop."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from aiollm.wire.arena import Arena
from aiollm.wire.framing import FrameReader, FrameWriter, enlarge
from aiollm.wire.messages import FromWorker, from_worker_decoder

ARENA_SIZE = 64 << 20  # bytes; touched only as far as it is used
REAP_SECONDS = 0.01


class Link:
    """`on_message` gets each message, `on_exit` the exit status once the process and all it wrote are done."""

    def __init__(
        self,
        source: int | None,
        followers: Sequence[int],
        others: Sequence[int],
        on_message: Callable[[bytes | memoryview, FromWorker], None],
        on_exit: Callable[["Link", int], None],
    ) -> None:
        """`source` and `followers` are this rank's ends of the decision log (rule O), `others` what else the process
        has open, under the same numbers."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        self.arena = Arena.create(ARENA_SIZE)
        inbox, self._to = os.pipe()
        self._from, outbox = os.pipe()
        for fd in (self._to, self._from):
            enlarge(fd)
            os.set_blocking(fd, False)
        theirs = [inbox, outbox, self.arena.fd, *([source] if source is not None else []), *followers, *others]
        command = [sys.executable, "-P", "-m", "aiollm.workers"]  # -P: no module of the current folder gets in
        command += ["--inbox", str(inbox), "--outbox", str(outbox), "--arena", str(self.arena.fd)]
        command += ["--source", str(source)] if source is not None else []
        command += ["--followers", *map(str, followers)] if followers else []
        # Signals to a whole group of processes are the server's to answer, also while the worker imports torch.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self.process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(inbox)
        os.close(outbox)
        self._writer = FrameWriter(self._to, self.arena)
        self._reader = FrameReader(self._from)
        self._writing = False
        self.closed = False
        """The process has ended, and everything is given back."""
        self.killed = False
        """By `kill`."""
        self._loop.add_reader(self._from, self._read)

    def send(self, body: bytes, number: int = 0) -> None:
        """Queue an encoded message; `number` is that of an update."""
        if not self.closed:
            self._writer.send(body, number)
            self._flush()

    def applied(self, number: int) -> None:
        """The worker has applied updates up to `number`: their space in the arena is free."""
        if not self.closed:
            self.arena.free(number)
            if self._writer.pending:
                self._flush()

    def kill(self) -> None:
        """End the process now; `on_exit` follows."""
        if self.process.poll() is None:
            self.killed = True
            self.process.kill()

    def _flush(self) -> None:
        try:
            full = self._writer.flush()
        except BrokenPipeError:
            full = False  # its end is read from the other pipe
        if full and not self._writing:
            self._loop.add_writer(self._to, self._flush)
        elif self._writing and not full:
            self._loop.remove_writer(self._to)
        self._writing = full

    def _read(self) -> None:
        for body in self._reader.read():
            self._on_message(body, from_worker_decoder.decode(body))
        if self._reader.closed:
            self._loop.remove_reader(self._from)
            self._reap()

    def _reap(self) -> None:
        """The pipe ended because the process is ending; a GPU's driver may take seconds to clean up after it."""
        status = self.process.poll()
        if status is None:
            self._loop.call_later(REAP_SECONDS, self._reap)
            return
        self.closed = True
        if self._writing:
            self._loop.remove_writer(self._to)
        os.close(self._from)
        os.close(self._to)
        self.arena.close()
        self._on_exit(self, status)
