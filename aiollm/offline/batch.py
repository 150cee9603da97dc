"""`aiollm batch IN OUT`: the requests of a file in OpenAI's batch format, answered as the server would answer them.

Answers are appended as they come, in any order; the same command again goes on where it was interrupted. A request that
fails is answered with its error, as a line that is none, and the others go on.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import msgspec
import uvloop
from aiohttp import web
from tqdm import tqdm

from aiollm import arguments
from aiollm.api.body import in_thread_if
from aiollm.api.errors import ApiError, described, internal
from aiollm.assembly import in_daemon_thread
from aiollm.config import Config
from aiollm.console import Console
from aiollm.engine.engine import EngineBusy
from aiollm.hub.errors import HubError
from aiollm.offline.batch_files import STANDARD, Answer, Answers, Asked, LineError, Response, asked
from aiollm.offline.session import ENDPOINTS, Session, session

log = logging.getLogger(__name__)

USAGE = "usage: aiollm batch IN OUT [MODEL] [flags]; - is standard input or output, `aiollm --help` lists the flags"
BROKEN, WRONG, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130
AHEAD = 2  # requests at hand, for each that can run


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 where every request was answered, SOME_FAILED where some with an error, BROKEN where the same
    command has to be run again."""
    if argv[:1] in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    files = argv[:2]
    if len(files) < 2 or any(file.startswith("-") and file != STANDARD for file in files):
        print(USAGE, file=sys.stderr)
        return WRONG
    settings = arguments.parse(["serve", *argv[2:]], os.environ)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        return uvloop.run(run(settings, *files))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("aiollm: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except (HubError, OSError, ValueError, RuntimeError) as error:
        print(f"aiollm: {error}", file=sys.stderr)
        return BROKEN


async def run(settings: Config, source: str, target: str) -> int:
    """Answer what is not answered yet; the exit status."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    console = Console()
    with (
        _opened(source) as requests,
        contextlib.closing(await in_daemon_thread(partial(Answers, target))) as answers,  # a pipe may wait for a reader
    ):
        total = None if source == STANDARD else await in_daemon_thread(partial(_count, source))
        async with session(settings, console.progress) as current:
            console.close()
            batch = Batch(current, answers, total)
            with contextlib.closing(batch.bar):
                await batch.run(requests)
    console.say(f"{batch.answered} answered, {batch.failed} with an error; {batch.skipped} were answered before")
    return SOME_FAILED if batch.failed + answers.done.failed else 0


class Batch:
    """One pass over the requests. Only those at hand are in memory, and the ids of all."""

    def __init__(self, current: Session, answers: Answers, total: int | None) -> None:
        self._session, self._answers = current, answers
        self._room = asyncio.Semaphore(AHEAD * current.parts.engine.limits.rows)
        self._met: set[str] = set()
        self.answered = self.failed = self.skipped = 0
        self.bar = tqdm(total=total, unit="request", dynamic_ncols=True, disable=None)

    async def run(self, requests: BinaryIO) -> None:
        """Raises RuntimeError where nothing can be computed any more, and OSError where a file is at fault."""
        try:
            async with asyncio.TaskGroup() as group:
                async for number, line in _lines(requests):
                    item = self._new(asked(line, number), number)
                    if item is None:
                        self.skipped += 1
                        self.bar.update()
                        continue
                    await self._room.acquire()
                    group.create_task(self._answer(item)).add_done_callback(lambda _: self._room.release())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _new(self, item: Asked | LineError, number: int) -> Asked | LineError | None:
        """What is to be answered now: None for what was before, an error for an id that came twice."""
        if isinstance(item, Asked) and item.custom_id in self._met:
            item = LineError(
                "duplicate_custom_id",
                f"line {number}: custom_id {item.custom_id!r} was there before",
                number,
                "custom_id",
            )
        if isinstance(item, LineError):
            return None if number in self._answers.done.lines else item
        self._met.add(item.custom_id)
        return None if item.custom_id in self._answers.done.ids else item

    async def _answer(self, item: Asked | LineError) -> None:
        id = f"batch_req_{uuid.uuid4().hex}"
        if isinstance(item, LineError):
            self._write(Answer(id, None, None, item))
            return
        status, body = await self._response(item)
        self._write(Answer(id, item.custom_id, Response(status, uuid.uuid4().hex, body), None))

    async def _response(self, item: Asked) -> tuple[int, Any]:
        """Status and JSON, as the server answers."""
        path = item.url.rstrip("/")
        try:
            if path not in ENDPOINTS:
                raise web.HTTPNotFound
            if item.method.upper() != "POST":
                raise web.HTTPMethodNotAllowed(item.method, ["POST"])
            generation, shape = await self._session.completed(path, bytes(item.body))
            return 200, await in_thread_if(generation.long, lambda: msgspec.Raw(msgspec.json.encode(shape.whole())))
        except (ApiError, EngineBusy, web.HTTPException) as error:
            if self._session.failure:  # to be asked again, in another run
                raise RuntimeError(self._session.failure) from error
            refused = described(error, item.url)
        except Exception:
            log.exception("the request %s failed", item.custom_id)
            refused = internal()
        return refused.status, refused.body()

    def _write(self, answer: Answer) -> None:
        self._answers.write(answer)
        self.answered += 1
        self.failed += answer.response is None or answer.response.status_code != 200
        self.bar.update()


async def _lines(file: BinaryIO) -> AsyncIterator[tuple[int, bytes]]:
    """Lines that are not blank, and their numbers from 1. A pipe may keep a reader waiting, so a thread does."""
    number = 0
    while line := await in_daemon_thread(file.readline):
        number += 1
        if line.strip():
            yield number, line


def _opened(path: str) -> BinaryIO:
    return open(0, "rb", closefd=False) if path == STANDARD else open(path, "rb")


def _count(path: str) -> int:
    with open(path, "rb") as file:
        return sum(not line.isspace() for line in file)
