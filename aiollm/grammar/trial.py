"""The process in which grammars are tried out: python -m aiollm.grammar.trial CONTROL VOCABULARY SIZE SECONDS

It reads the vocabulary once and forks for each grammar, so that a trial can be ended. llguidance 1.9.1 bounds neither
its time (an integer that is a multipleOf 9999991 was not compiled after 40 s), nor its stack (6,000 rules, each of
which names the next, end the process), nor its memory.
"""

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress

import msgspec
from llguidance import LLTokenizer

from aiollm.grammar.llguidance import GrammarError, lark, matcher_of, plain, tokenizer_of
from aiollm.wire.sampling import Grammar
from aiollm.wire.vocabulary import Vocabulary

PATIENCE = 4  # times the seconds of computing, in which a machine that is busy has to get there
MEMORY = 256 << 20  # bytes that a grammar may take
STACK = 8 << 20  # bytes; the threads of a worker that build what passed here have more
NICE = 10  # for what takes longer than QUICK: then others go first
QUICK = 0.5  # seconds
PR_SET_PDEATHSIG = 1


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """Why a grammar cannot be followed, empty if it can, and the grammar as workers should read it."""

    reason: str
    grammar: Grammar | None = None


encoder = msgspec.msgpack.Encoder()
BEGUN = b"."  # what an answer begins with, and all of it where a trial was ended


def main(control: socket.socket, vocabulary: int, size: int, seconds: float) -> None:
    """Try out what comes, until the server is gone: each message on `control` brings a socket, which has the grammar
    and gets the verdict. `vocabulary` is the descriptor of a file."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the server says when the end is
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that have ended
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(vocabulary, "rb") as file:
        known = msgspec.msgpack.decode(file.read(), type=Vocabulary)
    refusal, tokenizer = "", None
    try:
        tokenizer = tokenizer_of(known, size)
    except GrammarError as error:
        refusal = str(error)
    del known
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that is here
    control.send(b"ready")
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as asker, suppress(OSError):  # no room for a process: no answer
            if os.fork() == 0:
                try:
                    control.close()
                    _bound(seconds)
                    asker.send(BEGUN)
                    grammar = msgspec.msgpack.decode(b"".join(iter(lambda: asker.recv(1 << 20), b"")), type=Grammar)
                    asker.sendall(encoder.encode(_tried(grammar, tokenizer) if tokenizer else Verdict(refusal)))
                finally:
                    os._exit(0)


def _bound(seconds: float) -> None:
    """End this process where it takes more than it may, and let others go first where it takes long."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody would hear of it
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for limit, most in ((resource.RLIMIT_AS, used + MEMORY), (resource.RLIMIT_STACK, STACK)):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    later = threading.Timer(QUICK, os.setpriority, (os.PRIO_PROCESS, os.getpid(), NICE))
    later.daemon = True
    later.start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what Rust says when it gives up


def _tried(grammar: Grammar, tokenizer: LLTokenizer) -> Verdict:
    try:
        read = plain(grammar)
        matcher_of(grammar, tokenizer, lark(read))
    except GrammarError as error:
        return Verdict(str(error) or "it is not valid")
    except BaseException as error:  # noqa: BLE001  a panic in Rust is no Exception
        return Verdict(f"it cannot be compiled: {type(error).__name__}: {str(error)[:1000]}")
    return Verdict("", read)


if __name__ == "__main__":
    _, own, file, size, seconds = sys.argv
    main(socket.socket(fileno=int(own)), int(file), int(size), float(seconds))
