"""Run a recorded message stream without its server, and compare what comes out.

A record is a sequence of (direction u8, length u32, body): 0 to the workers, 1 from rank 0. The replay applies each
update in the iteration that applied it then, by the turns of the result headers, lets rows wait for their grammars as
they did then, and goes on by itself behind the last of them: into the iteration that the worker did not survive. So a
fault can be taken from one machine to another, and from a GPU to a CPU.
"""

import gc
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from aiollm.wire.columns import floats, ints
from aiollm.wire.messages import (
    Failed,
    FromWorker,
    Header,
    Loading,
    Ready,
    Result,
    Setup,
    ToWorker,
    Update,
    WorkerSettings,
    from_worker_decoder,
    to_worker_decoder,
)
from aiollm.workers import loop, overlap
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decision, Decisions
from aiollm.workers.load import load, stream_of
from aiollm.workers.step import Integers

HEAD = struct.Struct("<BI")
TO_WORKER, FROM_WORKER = 0, 1
NOBODY = np.empty(0, np.int32)


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """The (direction, body) pairs of a record; a last one that was cut off by a crash is left out."""
    data = path.read_bytes()
    at = 0
    while at + HEAD.size <= len(data):
        direction, length = HEAD.unpack_from(data, at)
        at += HEAD.size
        if at + length > len(data):
            return
        yield direction, data[at : at + length]
        at += length


class Recorded(Decisions):
    """Decisions taken from the result headers of a record: what each turn applied, who waited, and whether it launched.

    Behind the last header the replay leads itself.
    """

    def __init__(self, headers: list[Header]) -> None:
        super().__init__()
        self._headers = deque(headers)
        self._turn = 0
        self._applied = 0
        self._held = NOBODY
        self._ended = False

    @property
    def leads(self) -> bool:
        return self._ended

    def read(self) -> Decision:
        self._turn += 1
        self._ended = not self._headers  # the last launch is posted at the turn after this one, and then come new ones
        if self._ended or self._headers[0].turn > self._turn:
            return Decision(0, self._applied, False, False, 0, NOBODY, self._held)
        header, held = self._headers.popleft(), self._held
        self._applied, self._held = header.applied, ints(header.held)
        return Decision(0, self._applied, True, False, 0, ints(header.waiting), held)

    def check(self, decision: Decision, iteration: int, applied: int, rows: Integers) -> None:
        """A record has no checksums; the tokens are compared instead."""


class Now(Executor):
    """Does what is asked of it at once: whoever waited for it then waits by the record."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  the future's own
            future.set_exception(error)
        return future


class Comparison:
    """Inbox and outbox of a replay: recorded updates in, tokens out and against the recorded ones."""

    def __init__(self, updates: list[ToWorker], expected: list[Result | Failed]) -> None:
        self._updates = updates
        self._expected = {message.header.iteration: message for message in expected}
        self.iterations = self.tokens = self.differing = 0
        self.logprob = 0.0
        self.first = ""

    def drain(self) -> Iterator[ToWorker]:
        updates, self._updates = self._updates, []
        yield from updates

    def quiet(self, seconds: float) -> bool:
        return False  # nobody waits for a replay to be faster

    def wait(self) -> bool:
        return False

    def offer(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def put(self, message: FromWorker) -> None:
        if not isinstance(message, Result | Failed):
            return
        self.iterations += 1
        expected = self._expected.get(message.header.iteration)
        if expected is None and isinstance(message, Result):
            return  # behind the end of the record
        if isinstance(message, Failed) or not isinstance(expected, Result):
            if type(message) is not type(expected):
                self._note(f"iteration {message.header.iteration}: {message}")
            return
        found = dict(zip(_keys(message), zip(_tokens(message), floats(message.logprobs), strict=True), strict=True))
        for key, token, logprob in zip(_keys(expected), _tokens(expected), floats(expected.logprobs), strict=True):
            mine, own = found.get(key, (None, np.float32(0)))
            self.tokens += 1
            self.logprob = max(self.logprob, abs(float(own - logprob))) if mine == token else self.logprob
            if mine != token:
                self._note(f"iteration {message.header.iteration}, row {key[0]}: {mine} instead of {token}")

    def _note(self, what: str) -> None:
        self.differing += 1
        self.first = self.first or what


def _keys(result: Result) -> list[tuple[int, int]]:
    return list(zip(ints(result.rows).tolist(), ints(result.generations).tolist(), strict=True))


def _tokens(result: Result) -> list[int]:
    tokens: list[int] = ints(result.tokens).tolist()
    return tokens


class Epoch(NamedTuple):
    """What a record keeps of one group of workers."""

    setup: Setup
    ready: list[Ready]
    updates: list[ToWorker]
    results: list[Result | Failed]


def epochs(path: Path) -> list[Epoch]:
    """The epochs of a record, in order."""
    found: list[Epoch] = []
    for direction, body in read(path):
        message = (to_worker_decoder if direction == TO_WORKER else from_worker_decoder).decode(body)
        if isinstance(message, Setup):
            found.append(Epoch(message, [], [], []))
        elif isinstance(message, Ready):
            found[-1].ready.append(message)
        elif isinstance(message, Update):
            found[-1].updates.append(message)
        elif isinstance(message, Result | Failed):
            found[-1].results.append(message)
    return found


def main(path: str, device: str | None, folder: str | None) -> int:
    """Replay each epoch of a record that became ready; 0 where every token came out as recorded."""
    differing = 0
    for epoch in (epoch for epoch in epochs(Path(path)) if epoch.ready):
        recorded, ready = epoch.setup.settings, epoch.ready[0]
        settings = msgspec.structs.replace(
            recorded,
            device=device or recorded.device,
            folder=os.path.abspath(folder or recorded.folder),
            rank=0,
            ranks=1,
            slots=ready.slots,  # not those that fit here: the updates name slots of that pool
            max_length=ready.max_length,
            again=True,
        )
        differing += _replay(epoch, settings)
        gc.collect()
        torch.cuda.empty_cache()  # a GPU has no room for the model of the next epoch beside this one
    return 1 if differing else 0


def _replay(epoch: Epoch, settings: WorkerSettings) -> int:
    """Run one epoch and tell how it went; how many tokens differ."""
    stream = stream_of(settings)
    with stream.context():
        runner, ready = load(settings, _tell)
    comparison = Comparison(epoch.updates, epoch.results)
    decisions = Recorded([message.header for message in epoch.results])
    began = time.monotonic()
    number, rows = epoch.setup.epoch, settings.rows
    constraints = Constraints(epoch.setup.vocabulary, ready.vocabulary, Now(), Now(), Now())
    overlap.run(
        loop.Loop(
            number, rows, comparison, comparison, stream, runner, runner.staging, decisions, constraints,
            runner.mask_staging,
        )
    )  # fmt: skip
    stream.close()
    seconds = time.monotonic() - began
    print(
        f"epoch {number}: {comparison.iterations} iterations in {seconds:.1f} s, {comparison.tokens} tokens,"
        f" {comparison.differing} differ, logprobs within {comparison.logprob:.2g}"
        + (f"; first: {comparison.first}" if comparison.first else "")
    )
    return comparison.differing


def _tell(loading: Loading) -> None:
    if loading.fraction == 0:
        print(loading.phase, flush=True)
