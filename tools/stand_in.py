"""A worker without a model that keeps the loop's contract, and the real front end over it.

    python tools/stand_in.py [--rows 2048] [--step 0.5]

serves on a free port until SIGTERM; on SIGUSR1 its worker dies, and another one takes its place soon.
"""

import argparse
import asyncio
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from aiohttp import web

from aiollm.api.app import make_app, serve
from aiollm.api.parts import ModelInfo
from aiollm.engine.engine import Engine, Settings
from aiollm.engine.policy import Conservative
from aiollm.garbage import collect_at_rest, settle
from aiollm.hub.resolve import resolve
from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.columns import ints, pack, pack_floats
from aiollm.wire.messages import Header, Ready, Result, Update, encoder, from_worker_decoder

EARLY = 0.001  # uvloop's timers may be early by so much
CONTEXT = 8192
AWAY = 0.3  # seconds until another worker takes a dead one's place
TOP = 20  # most alternatives of a token that a request may ask for
APART = 31  # positions of the text between two rows' alternatives


class Said(NamedTuple):
    """What every row says over and over, and what it might have said instead at each position, likeliest first."""

    tokens: np.ndarray  # [n] int32
    top_ids: np.ndarray  # [n, TOP] int32
    top_logprobs: np.ndarray  # [n, TOP] float32


def said(tokens: list[int], vocabulary: int) -> Said:
    """`tokens` with alternatives of which few are common and most are rare, as ids of a vocabulary made by merges are:
    the small ones come first."""
    random = np.random.default_rng(0)
    ids = np.exp(random.uniform(0.0, np.log(vocabulary), (len(tokens), TOP))).astype(np.int32)
    logprobs = -np.cumsum(random.exponential(1.0, (len(tokens), TOP)), axis=1, dtype=np.float32)
    return Said(np.array(tokens, np.int32), ids, logprobs)


class StandIn:
    """A worker without a model (engine.Workers). What it draws is always the likeliest token."""

    def __init__(
        self,
        rows: int,
        step: float,
        said: Said,
        publish: Callable[[bytes], None],
        log: list[list[Update]] | None = None,
    ) -> None:
        """`step` is the seconds of an iteration, `publish` takes encoded results.

        `log` is given the updates that came before each iteration.
        """
        self._step, self._said, self._log = step, said, log
        self._publish = publish
        self._queue: deque[Update] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._applied = self._iteration = 0
        self._active = np.zeros(rows, bool)
        self._generation, self._position, self._known, self._granted, self._limit, self._top = np.zeros(
            (6, rows), np.int64
        )
        self.epoch = 0
        if log is not None:
            log.append([])

    def send(self, update: Update) -> None:
        self.take(update)
        if self._timer is None:
            self._due = asyncio.get_running_loop().time() + self._step
            self._timer = asyncio.get_running_loop().call_at(self._due, self._turn)

    def applied(self, number: int) -> None:
        assert number <= self._applied

    def take(self, update: Update) -> None:
        self._queue.append(update)
        if self._log is not None:
            self._log[-1].append(update)

    def stop(self) -> None:
        """No iteration follows."""
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        """Every iteration that is due by now."""
        loop = asyncio.get_running_loop()
        works = True
        while works and self._due <= loop.time() + EARLY:
            works = self.step()
            self._due += self._step
        self._timer = loop.call_at(self._due, self._turn) if works else None

    def step(self) -> bool:
        """One iteration: updates up to the first with chunks, its chunks, and one token of every row with credit."""
        chunks = np.empty((3, 0), np.int32)
        while self._queue and not chunks.size:
            chunks = self._apply(self._queue.popleft())
        decodes = self._active & (self._position >= self._known) & (self._position < self._limit - 1)
        credit = self._position < self._granted
        decoding = np.flatnonzero(decodes & credit)
        if not len(decoding) and not chunks.size:
            return bool(self._queue)
        rows, starts, counts = chunks
        self._position[rows] = starts + counts
        self._position[decoding] += 1
        sampled = np.concatenate([decoding, rows[self._position[rows] >= self._known[rows]]])
        self._iteration += 1
        if self._log is not None:
            self._log.append([])
        header = Header(
            self.epoch, self._iteration, self._iteration, self._applied, int(self._step * 1e6), 0,
            pack(np.flatnonzero(decodes & ~credit)),
        )  # fmt: skip
        said, at = self._said, self._position[sampled]
        top, places = max(0, self._top[sampled].max(initial=0)), (at + APART * sampled) % len(said.tokens)
        tokens, ids, logprobs = said.tokens[at % len(said.tokens)], said.top_ids[places], said.top_logprobs[places]
        ids[:, 0] = tokens
        result = Result(
            header=header,
            rows=pack(sampled),
            generations=pack(self._generation[sampled]),
            tokens=pack(tokens),
            logprobs=pack_floats(logprobs[:, 0]),
            hints=bytes(len(sampled)),
            top=int(top),
            top_ids=pack(ids[:, :top]),
            top_logprobs=pack_floats(logprobs[:, :top]),
        )
        self._publish(encoder.encode(result))
        return True

    def _apply(self, update: Update) -> np.ndarray:
        """Take the rows' part of an update; its chunks as (rows, starts, counts)."""
        self._applied = update.number
        self._active[ints(update.retire)] = False
        for admit in update.admit:
            row = admit.row
            self._active[row], self._generation[row], self._position[row] = True, admit.generation, 0
            self._known[row], self._limit[row] = admit.tokens, admit.limit
            self._top[row] = admit.sampling.top_logprobs
        self._granted[ints(update.slots.rows)] = ints(update.slots.starts) + ints(update.slots.counts)
        return np.stack([ints(update.chunk_rows), ints(update.chunk_starts), ints(update.chunk_counts)])


class Front(NamedTuple):
    """The real server around a stand-in."""

    engine: Engine
    app: web.Application
    ready: Ready
    said: Said

    def worker(self, rows: int, step: float, log: list[list[Update]] | None = None) -> StandIn:
        """A new stand-in at work; the one before it, if any, counts as dead."""

        def publish(body: bytes) -> None:
            self.engine.on_message(from_worker_decoder.decode(body))

        worker = StandIn(rows, step, self.said, publish, log)
        worker.epoch = self.engine.on_ready(self.ready, worker)
        return worker


def front(rows: int, queue: int, slots: int, budget: int = 2048) -> Front:
    """With the demo model's tokenizer and template. `queue` requests may wait, the KV cache has so many `slots`, and an
    iteration computes `budget` tokens of prompts."""
    folder = resolve(None, need_weights=False, progress=lambda phase, fraction: None).folder
    tokenizer = Tokenizer.load(folder)
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    engine = Engine(Settings(rows, budget, budget, True, Conservative(), queue))
    app = make_app(engine, tokenizer, ChatTemplate.load(folder), ModelInfo(("demo",), 0, "demo"), {})
    ready = Ready(
        slots=slots, max_length=CONTEXT, vocabulary=tokenizer.vocab_size, architecture="none", data_type="none",
        budget=[], seconds=[],
    )  # fmt: skip
    return Front(engine, app, ready, said(tokenizer.encode(text, False), tokenizer.vocab_size))


async def run(rows: int, step: float) -> None:
    """Serve until SIGTERM, with a cache that short chats fill."""
    made = front(rows, rows // 8, 80 * rows, 4096)
    worker = made.worker(rows, step)
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def die() -> None:
        worker.stop()
        made.engine.on_death()
        loop.call_later(AWAY, revive)

    def revive() -> None:
        nonlocal worker
        worker = made.worker(rows, step)

    settle()  # as the server does
    cleaning = asyncio.create_task(collect_at_rest(lambda: made.engine.core is None or made.engine.core.idle))
    loop.add_signal_handler(signal.SIGUSR1, die)
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    runner = await serve(made.app, "127.0.0.1", 0)
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", file=sys.stderr, flush=True)
    await stopped.wait()
    cleaning.cancel()
    await runner.shutdown()
    await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description="the real front end over a worker without a model")
    parser.add_argument("--rows", type=int, default=2048, help="choices that run at once (2048)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of an iteration (0.5)")
    args = parser.parse_args()
    uvloop.run(run(args.rows, args.step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
