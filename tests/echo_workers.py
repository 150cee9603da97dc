"""Workers without a model: they keep the contract of the loop and answer from a script."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from aiollm.engine.engine import Engine
from aiollm.wire.columns import ints, pack, pack_floats
from aiollm.wire.messages import Failed, Header, PromptLogprobs, Result, Update
from aiollm.workers.rows import Rows

EOS = 258
HIDDEN = 8
HOPS = 6  # turns of the loop between two iterations: enough for the server to write what the first one brought

Reply = Callable[[list[int], int], Sequence[int]]
"""(prompt ids, seed) -> output ids; after them comes EOS, again and again."""


def echo(prompt: list[int], seed: int) -> Sequence[int]:
    return prompt


def logprob(token_id: int) -> float:
    """The made-up logprob of a token: exact in float32."""
    return -token_id / 64


def hidden_of(ids: list[int]) -> list[float]:
    """The made-up hidden state at the last of these ids."""
    return [float(len(ids)), float(ids[-1] % 7), *[1.0] * (HIDDEN - 2)]


class EchoWorkers:
    """Implements engine.Workers. One iteration at a time; set `held` and call `step` to turn it by hand."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self._engine = engine
        self._rows = Rows(rows)
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._queue: deque[Update] = deque()
        self._applied = 0
        self._iteration = 0
        self._scheduled = False
        self.held = False
        self.reply: Reply = echo
        self.launched = 0  # tokens drawn since the reset

    def reset(self) -> None:
        """Back to echoing, whatever a test has left."""
        self.reply = echo
        self.launched = 0
        self.release()

    def release(self) -> None:
        """Turn by themselves again."""
        self.held = False
        self._schedule()

    def say(self, *texts: str) -> None:
        """Answer with texts: choice i of a request with seed 0 gets texts[i]."""
        self.reply = lambda prompt, seed: list(texts[seed % len(texts)].encode())

    def send(self, update: Update) -> None:
        self._queue.append(update)
        self._schedule()

    def applied(self, number: int) -> None:
        assert number <= self._applied

    def _schedule(self, hops: int = 1) -> None:
        if not self._scheduled and not self.held:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._hop, hops)

    def _hop(self, hops: int) -> None:
        if hops > 1:
            asyncio.get_running_loop().call_soon(self._hop, hops - 1)
            return
        self._scheduled = False
        self.step()
        if self._queue or len(self._rows.runnable()[0]):
            self._schedule(HOPS)

    def step(self) -> None:
        """One iteration: updates up to the first with chunks, its chunks, and one token of every row with credit."""
        chunks: list[tuple[int, int, int]] = []
        while self._queue and not chunks:
            update = self._queue.popleft()
            self._apply(update)
            columns = (update.chunk_rows, update.chunk_starts, update.chunk_counts)
            chunks = list(zip(*(ints(column).tolist() for column in columns), strict=True))
        decoding, stalled = self._rows.runnable()
        sampled = decoding.tolist()
        prompts = []
        for row, start, count in chunks:
            self._rows.launched(np.array([row]), np.array([start + count]))
            prompts += self._prompt_logprobs(row, start, start + count)
            if self._rows.decoding[row]:
                sampled.append(row)
        self._rows.launched(decoding, self._rows.position[decoding] + 1)
        self._iteration += 1
        ids = [self._draw(row) for row in sampled]
        top = max((self._rows.sampling[row].top_logprobs for row in sampled), default=0)
        top = max(top, 0)
        likeliest = [_likeliest(drawn, top) for drawn in ids]
        embeds = [at for at, row in enumerate(sampled) if self._rows.sampling[row].embed]
        hidden = [value for at in embeds for value in hidden_of(self._tokens[sampled[at]][:-1])]
        self._engine.on_message(
            Result(
                header=self._header(stalled),
                rows=pack(sampled),
                generations=pack(self._rows.generation[sampled]),
                tokens=pack(ids),
                logprobs=pack_floats([logprob(drawn) for drawn in ids]),
                hints=bytes(len(ids)),
                top=top,
                top_ids=pack([drawn for column in likeliest for drawn in column]),
                top_logprobs=pack_floats([logprob(drawn) for column in likeliest for drawn in column]),
                prompts=prompts,
                hidden_at=pack(embeds),
                hidden=pack_floats(hidden),
            )
        )

    def fail(self, error: str) -> None:
        """The next iteration with chunks computes nothing but them, and comes to nothing."""
        rows = np.empty(0, np.int32)
        while not len(rows):
            update = self._queue.popleft()
            self._apply(update)
            rows = ints(update.chunk_rows)
        self._rows.launched(rows, ints(update.chunk_starts) + ints(update.chunk_counts))
        self._iteration += 1
        self._engine.on_message(
            Failed(
                header=self._header(np.empty(0, np.int64)),
                rows=update.chunk_rows,
                generations=pack(self._rows.generation[rows]),
                starts=update.chunk_starts,
                counts=update.chunk_counts,
                error=error,
            )
        )

    def _header(self, stalled: np.ndarray) -> Header:
        return Header(
            epoch=self._engine.core.epoch,
            iteration=self._iteration,
            turn=self._iteration,
            applied=self._applied,
            device_us=1000,
            idle_us=10,
            stalled=pack(stalled),
        )

    def _apply(self, update: Update) -> None:
        self._rows.apply(update)
        self._applied = update.number
        for admit in update.admit:
            self._tokens[admit.row] = []
        columns = (update.tokens.rows, update.tokens.starts, update.tokens.counts)
        values = ints(update.tokens.values).tolist()
        for row, start, count in zip(*(ints(column).tolist() for column in columns), strict=True):
            assert len(self._tokens[row]) == start
            self._tokens[row] += values[:count]
            del values[:count]

    def _draw(self, row: int) -> int:
        """The next id of a row; it turns idle where it ends."""
        sampling, prompt = self._rows.sampling[row], int(self._rows.prompt[row])
        at = int(self._rows.position[row]) - prompt
        script = self.reply(self._tokens[row][:prompt], sampling.seed)
        drawn = script[at] if at < len(script) else EOS
        if drawn in sampling.stop_ids and at < sampling.min_tokens:
            drawn = ord("~")  # masked: something else is drawn
        self.launched += 1
        self._tokens[row].append(drawn)
        self._rows.idle[row] |= drawn in sampling.stop_ids
        return drawn

    def _prompt_logprobs(self, row: int, start: int, end: int) -> list[PromptLogprobs]:
        top, prompt = self._rows.sampling[row].prompt_logprobs, int(self._rows.prompt[row])
        ids = self._tokens[row][start + 1 : min(end + 1, prompt)]
        if top < 0 or not ids:
            return []
        likeliest = [other for drawn in ids for other in _likeliest(drawn, top)]
        columns = (
            pack_floats([logprob(drawn) for drawn in ids]),
            pack([drawn + 1 for drawn in ids]),
            pack(likeliest),
            pack_floats(list(map(logprob, likeliest))),
        )
        return [PromptLogprobs(row, int(self._rows.generation[row]), start + 1, *columns)]


def _likeliest(token_id: int, top: int) -> list[int]:
    """`token_id` and those after it: less likely ones."""
    return [token_id + i for i in range(top)]
