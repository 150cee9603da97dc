"""The server's end of the process in which grammars are tried out (trial.py)."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import msgspec

from aiollm.grammar.llguidance import GrammarError
from aiollm.grammar.trial import BEGUN, PATIENCE, Verdict, encoder
from aiollm.wire.sampling import Grammar
from aiollm.wire.vocabulary import Vocabulary

START_SECONDS = 60.0  # that process takes 10 us for each token, beside what Python does

_decoder = msgspec.msgpack.Decoder(Verdict)


class NoTrial(Exception):
    """A grammar could not be tried out, for no fault of its own; says why."""


class Trials:
    """From the event loop only. The process begins with the first trial, and again where it has ended."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], size: int, seconds: float) -> None:
        """`vocabulary` makes that of a model with `size` ids, in a thread; `seconds` are those of computing that a
        grammar has."""
        self._vocabulary = vocabulary
        self._size = size
        self._seconds = seconds
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def attempt(self, grammar: Grammar) -> Verdict:
        """Raises NoTrial, and GrammarError where the trial was ended."""
        try:
            body = encoder.encode(grammar)
        except UnicodeEncodeError as error:
            raise GrammarError(f"it is no text: {error}") from error
        async with self._starting:
            if self._process is None or self._process.poll() is not None:
                await asyncio.to_thread(self._start)
        began = time.monotonic()
        answer = await self._asked(body)
        took = time.monotonic() - began
        if len(answer) > len(BEGUN):
            return _decoder.decode(answer[len(BEGUN) :])
        if not answer:
            raise NoTrial("the process that tries out grammars cannot begin with it")
        if took >= PATIENCE * self._seconds:
            raise NoTrial("this machine is too busy to try it out")
        if took >= self._seconds:
            raise GrammarError(f"it is too complex: it was not compiled within {self._seconds:g} s")
        raise GrammarError("it is too complex: it nests too deeply, or takes too much memory")

    async def _asked(self, body: bytes) -> bytes:
        mine, theirs = socket.socketpair()
        assert self._control is not None
        try:
            with theirs:
                socket.send_fds(self._control, [b"."], [theirs.fileno()])
        except OSError as error:
            mine.close()
            raise NoTrial(f"the process that tries out grammars has ended: {error}") from error
        reader, writer = await asyncio.open_connection(sock=mine)
        try:
            writer.write(body)
            writer.write_eof()
            return await reader.read()
        except OSError:  # it has ended before it read everything
            return b""
        finally:
            writer.close()

    def _start(self) -> None:
        """In a thread."""
        vocabulary = msgspec.msgpack.encode(self._vocabulary())
        control, theirs = socket.socketpair()
        control.settimeout(START_SECONDS)
        with theirs, open(os.memfd_create("vocabulary"), "w+b") as file:
            file.write(vocabulary)
            file.seek(0)
            command = [sys.executable, "-P", "-m", "aiollm.grammar.trial", str(theirs.fileno()), str(file.fileno())]
            command += [str(self._size), str(self._seconds)]
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), file.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # one more takes 128 MB of a trial's addresses
            )
        self._control, self._process = control, process
        weakref.finalize(self, _end, process, control)
        ready = b""
        with contextlib.suppress(TimeoutError):
            ready = control.recv(16)
        if not ready:
            _end(process, control)
            raise NoTrial("the process that tries out grammars does not start")


def _end(process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    control.close()
    process.kill()
    process.wait()
