"""A worker process: one rank. Started by the server with the descriptors of its pipes, or by hand to replay a record.

python -m aiollm.workers --replay FILE [--device cuda] [--model_dir FOLDER]
"""

import argparse
import gc
import os
import sys
from contextlib import suppress

from aiollm.wire.arena import Arena
from aiollm.wire.framing import FrameReader, FrameWriter
from aiollm.wire.messages import Fatal, FromWorker, Setup
from aiollm.workers import loop, overlap, replay
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decisions
from aiollm.workers.load import load, stream_of
from aiollm.workers.pipes import PipeInbox, PipeOutbox


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aiollm.workers", description="one rank of an aiollm server")
    parser.add_argument("--replay", metavar="FILE", help="run a message stream that a server kept with --record")
    parser.add_argument("--device", help="replay on this device instead of the recorded one")
    parser.add_argument("--model_dir", help="replay with this model folder instead of the recorded one")
    for name in ("inbox", "outbox", "arena", "source"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--followers", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        return replay.main(args.replay, args.device, args.model_dir)
    if args.inbox is None or args.outbox is None or args.arena is None:
        parser.error("a worker is started by the server; by hand, use --replay FILE")
    return serve(args.inbox, args.outbox, args.arena, Decisions(args.source, args.followers))


def serve(inbox_fd: int, outbox_fd: int, arena_fd: int, decisions: Decisions) -> int:
    """Load, then iterate until the server says stop or is gone. What goes wrong is the last message and line."""
    for fd in (inbox_fd, outbox_fd):
        os.set_blocking(fd, False)
    inbox = PipeInbox(FrameReader(inbox_fd, Arena.attach(arena_fd)))
    outbox = PipeOutbox(FrameWriter(outbox_fd), speaks=decisions.leads)
    quiet: tuple[type[Exception], ...] = (ValueError, MemoryError, OSError)  # sentences for the user, while it loads
    try:
        setup = _first(inbox)
        if setup is None:
            return 0

        def tell(message: FromWorker) -> None:
            outbox.put(message)
            outbox.flush()

        settings = setup.settings
        stream = stream_of(settings)
        with stream.context():
            runner, ready = load(settings, tell)
        gc.collect()
        gc.freeze()  # what is here stays: a full collection takes 40 ms without this, which a step would wait for
        quiet = (EOFError,)  # another rank is gone, and tells why itself
        constraints = Constraints(setup.vocabulary, ready.vocabulary) if decisions.leads else None
        state = loop.Loop(
            setup.epoch, settings.rows, inbox, outbox, stream, runner, runner.staging, decisions, constraints,
            runner.mask_staging,
        )  # fmt: skip
        tell(ready)
        try:
            overlap.run(state)
        finally:
            if constraints is not None:
                constraints.close()
        stream.close()
        return 0
    except BrokenPipeError:
        return 0  # the server is gone
    except Exception as error:  # noqa: BLE001  the server is told
        if not isinstance(error, quiet):
            sys.excepthook(type(error), error, error.__traceback__)
        reason = str(error) if isinstance(error, quiet) else ""
        outbox.put(Fatal(reason or f"{type(error).__name__}: {error}"))
        with suppress(BrokenPipeError):
            outbox.flush()
        return 1


def _first(inbox: PipeInbox) -> Setup | None:
    """The Setup that opens the stream; None if the server left before it said anything."""
    while inbox.wait():
        for message in inbox.drain():
            if not isinstance(message, Setup):
                raise ValueError(f"the first message is {type(message).__name__}, not Setup")
            return message
    return None


if __name__ == "__main__":
    sys.exit(main())
