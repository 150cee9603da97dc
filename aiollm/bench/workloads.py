"""What a load consists of: how many requests, when they come, how long their prompts and outputs are.

Everything is drawn from one seed, so that two runs, and two servers, do the same work. Prompts are token ids: a text
has another length for each tokenizer.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

T = TypeVar("T")
SHAREGPT = Path(__file__).parent / "sharegpt_lengths.json"
RAMPS = ("linear", "exponential")
SHARED_TEXTS = 8  # from which the beginnings of prompts are taken where `shared` says so
Lengths = Callable[[random.Random], tuple[int, int]]
"""Prompt and output tokens of one request."""


class LoadError(Exception):
    """The load cannot be made; the message is for the user and names the flag."""


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """One request: what comes behind the conversation so far, as ids or (a whole prompt) as text."""

    prompt: list[int] | str
    output: int


class Job(msgspec.Struct, frozen=True, array_like=True):
    """A conversation; most have one turn. `at` is its second after the start, 0 where concurrency sets the pace."""

    at: float
    turns: list[Turn]


class Ramp(NamedTuple):
    """Requests per second that rise over a load, from `start` at the first request to `end` at the last."""

    strategy: str
    """One of RAMPS."""
    start: float
    end: float

    def rate(self, share: float) -> float:
        """Where this share of the requests, 0 to 1, has come."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * share
        return float(self.start * (self.end / self.start) ** share)


class Workload(NamedTuple):
    """A named load. `lengths` may be a file of [prompt, output] pairs, which are taken in their order."""

    requests: int
    concurrency: int | None
    rate: float | None
    """Requests per second, drawn as they would come from many independent users."""
    lengths: Lengths | Path
    ramp: Ramp | None = None
    """In place of `rate`."""


def fixed(prompt: int, output: int) -> Lengths:
    return lambda r: (prompt, output)


def around(prompt: int, output: int, prompt_ratio: float, output_ratio: float) -> Lengths:
    """Uniform within these ratios of the lengths."""

    def draw(r: random.Random, length: int, ratio: float) -> int:
        return max(1, r.randint(int(length * (1 - ratio)), int(length * (1 + ratio))))

    return lambda r: (draw(r, prompt, prompt_ratio), draw(r, output, output_ratio))


def _short_answers(r: random.Random) -> tuple[int, int]:
    return 1024, max(8, int(r.gauss(128, 32)))


def _like_chats(r: random.Random) -> tuple[int, int]:
    """Log-normal lengths, clipped: many short ones, a few long ones."""
    prompt = min(3000, max(4, int(r.lognormvariate(4.7, 1.2))))
    return prompt, min(1500, max(4, int(r.lognormvariate(4.9, 0.9))))


# sharegpt_lengths.json: lengths of 2,000 real conversations of ShareGPT, filtered as the vLLM benchmark of 2023 did.
WORKLOADS = {
    "smoke": Workload(4, 2, None, fixed(32, 16)),
    "single": Workload(4, 1, None, fixed(128, 256)),
    "c8": Workload(32, 8, None, fixed(512, 256)),
    "seed-v1.0": Workload(400, 100, None, _short_answers),
    "seed-v1.1-1k1k": Workload(200, None, 100, fixed(1024, 1024)),
    "seed-v1.1-4k1k": Workload(200, None, 100, fixed(4096, 1024)),
    "seed-v1.1-8k1k": Workload(200, None, 100, fixed(8192, 1024)),
    "sharegpt": Workload(2000, None, 200, SHAREGPT),
    "sharegpt-like": Workload(1000, None, 200, _like_chats),
    "decode-256": Workload(256, 256, None, fixed(64, 512)),
    "decode-1024": Workload(1024, 1024, None, fixed(64, 256)),
    "prefill": Workload(64, 64, None, fixed(4096, 1)),
    "cpu-c1": Workload(4, 1, None, fixed(64, 64)),
    "cpu-c16": Workload(32, 16, None, fixed(64, 64)),
}


class Draw(NamedTuple):
    """How prompts and arrivals are drawn, beside their lengths."""

    seed: int
    low: int
    high: int
    """Token ids are drawn from [low, high)."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the time between requests: 1 is Poisson, less comes in bursts, inf evenly."""
    prefix: int = 0
    """Tokens that all prompts begin with, before their own."""
    prefixes: int = 1
    """Different such beginnings, taken in turn."""
    shared: float = 0.0
    """Share of a conversation's first prompt that it has from one of SHARED_TEXTS texts."""
    turns: int = 1
    """Requests of a conversation; each prompt holds all that was said before."""
    point: int = 0
    """Which of several loads that are run in turn: each has prompts that no other has left in the server's cache."""


def jobs(load: Workload, draw: Draw) -> list[Job]:
    """The whole load, in order of arrival. Raises LoadError for a file that cannot be read.

    Points differ in their token ids alone: lengths, arrivals, and which prompts begin alike are the same for all.
    """
    r = random.Random(draw.seed)
    lengths = _lengths(load.lengths, r)
    aside = random.Random(draw.seed + 1)  # so that prompts stay the same where beginnings are shared
    beginnings = [_ids(aside, draw, draw.prefix) for _ in range(draw.prefixes)] if draw.prefix else [[]]
    texts: list[list[int]] = [[] for _ in range(SHARED_TEXTS)]
    found, at = [], 0.0
    conversations = -(-load.requests // draw.turns)
    for number in range(conversations):
        turns = []
        for turn in range(min(draw.turns, load.requests - number * draw.turns)):
            prompt, output = next(lengths)
            ids = _ids(r, draw, prompt)
            common = 0 if turn else int(draw.shared * prompt)
            if common:
                text = texts[number % SHARED_TEXTS]
                text += _ids(aside, draw, common - len(text))
                ids[:common] = text[:common]
            turns.append(Turn(ids if turn else beginnings[number % len(beginnings)] + ids, output))
        found.append(Job(at, turns))
        at += _wait(r, load, number, conversations, draw.burstiness)
    return _with_other_ids(found, draw) if draw.point else found


def _with_other_ids(found: list[Job], draw: Draw) -> list[Job]:
    """Each id replaced by another one of the range, the same for all prompts of a point."""
    others = list(range(draw.low, draw.high))
    random.Random(f"{draw.seed} {draw.point}").shuffle(others)

    def other(prompt: list[int] | str) -> list[int] | str:
        return prompt if isinstance(prompt, str) else [others[token - draw.low] for token in prompt]

    return [Job(job.at, [Turn(other(turn.prompt), turn.output) for turn in job.turns]) for job in found]


def with_output(found: list[Job], output: int | None) -> list[Job]:
    """The same with answers of `output` tokens each; None leaves them as they are."""
    if output is None:
        return found
    return [Job(job.at, [Turn(turn.prompt, output) for turn in job.turns]) for job in found]


def read_texts(path: Path, output: int | None) -> list[Turn]:
    """Prompts from a file of JSON lines, {"prompt": text, "output_tokens": n}, with answers of `output` tokens; None
    takes the lines' own. Raises LoadError."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        turns = [Turn(str(line["prompt"]), output or int(line["output_tokens"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"prompt": text}' if output else '{"prompt": text, "output_tokens": n}, as --custom-output-len -1 needs'
        raise LoadError(f"--dataset-path: {path} is no file of lines {form}: {error!r}") from error
    if min((turn.output for turn in turns), default=1) < 1:
        raise LoadError(f"--dataset-path: {path} has output_tokens of less than 1")
    if not turns:
        raise LoadError(f"--dataset-path: {path} is empty")
    return turns


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    result = list(items)
    random.Random(seed).shuffle(result)
    return result


def text_jobs(turns: Sequence[Turn], load: Workload, draw: Draw) -> list[Job]:
    """A load of texts in their order, from the first again where they are few.

    Behind the first point each text begins with the point's number, so that no other point has left it in the server's
    cache.
    """
    r = random.Random(draw.seed)
    if draw.point:
        turns = [Turn(f"{draw.point + 1}. {turn.prompt}", turn.output) for turn in turns]
    found, at = [], 0.0
    for number in range(load.requests):
        found.append(Job(at, [turns[number % len(turns)]]))
        at += _wait(r, load, number, load.requests, draw.burstiness)
    return found


def _lengths(lengths: Lengths | Path, r: random.Random) -> Iterator[tuple[int, int]]:
    if not isinstance(lengths, Path):
        while True:
            yield lengths(r)
    try:
        pairs = msgspec.json.decode(lengths.read_bytes(), type=list[tuple[int, int]])
    except (OSError, msgspec.DecodeError) as error:
        raise LoadError(f"--dataset-path: {lengths} is no JSON list of [prompt, output] lengths: {error}") from error
    if not pairs or min(map(min, pairs)) < 1:
        raise LoadError(f"--dataset-path: {lengths} must hold at least one pair of lengths, each 1 or more")
    while True:
        yield from pairs


def _ids(r: random.Random, draw: Draw, count: int) -> list[int]:
    return [r.randrange(draw.low, draw.high) for _ in range(count)]


def _wait(r: random.Random, load: Workload, number: int, count: int, burstiness: float) -> float:
    """Seconds from conversation `number` of `count` to the next; 0 where nothing sets the pace."""
    rate = load.ramp.rate(number / max(1, count - 1)) if load.ramp else load.rate
    if rate is None:
        return 0.0
    if math.isinf(burstiness):
        return 1 / rate
    return r.expovariate(rate) if burstiness == 1 else r.gammavariate(burstiness, 1 / (rate * burstiness))
