"""What is asked of the simulated server. Lengths are tokens; prompts are random, so that they share what is said here.

The first three are those of the Past-Future paper's artifact (WuSiYu/lightllm-ae, behavior-analysis), 3,000 requests of
uniform lengths; its server runs had a pool of 120,000 tokens and max_tokens of 6,000.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from simulator import VOCABULARY, Ask

CAP = 6000
ARTIFACT_POOL = 120_000


class Uniform(NamedTuple):
    prompt: tuple[int, int]
    output: tuple[int, int]
    cap: int
    """max_tokens in the artifact's accounting: its own 4,096, or the longest output where that is more."""


UNIFORM = {
    "decode-heavy": Uniform((32, 4096), (2048, 4096), 4096),
    "balanced": Uniform((3000, 5000), (3000, 5000), 5000),
    "prefill-heavy": Uniform((2048, 4096), (32, 4096), 4096),
}


def prompt_of(random: np.random.Generator, length: int) -> np.ndarray:
    return random.integers(1, VOCABULARY, length)


def uniform(name: str, seed: int = 0, cap: int | None = None, most: int | None = None) -> Iterator[Ask]:
    """One of `UNIFORM`, without end unless `most` says otherwise."""
    lengths, random = UNIFORM[name], np.random.default_rng(seed)
    for _ in count() if most is None else range(most):
        prompt = int(random.integers(lengths.prompt[0], lengths.prompt[1] + 1))
        output = int(random.integers(lengths.output[0], lengths.output[1] + 1))
        yield Ask(prompt_of(random, prompt), output, cap or lengths.cap)


def scaled(asks: Iterator[Ask], scale: int) -> Iterator[Ask]:
    """The same with all lengths divided by `scale`, for models and machines that are smaller."""
    for ask in asks:
        yield ask._replace(
            prompt=ask.prompt[: max(1, len(ask.prompt) // scale)], output=max(2, ask.output // scale),
            max_tokens=max(2, ask.max_tokens // scale),
        )  # fmt: skip


def reasoning(seed: int = 0, cap: int = CAP) -> Iterator[Ask]:
    """Short questions and long answers: averages of 381 and 2,160 as the paper's ShareGPT-o1 has, log-normal."""
    random = np.random.default_rng(seed)
    while True:
        prompt = int(np.clip(random.lognormal(np.log(381) - 0.5, 1.0), 8, 12_000))
        output = int(np.clip(random.lognormal(np.log(2160) - 0.18, 0.6), 16, cap))
        yield Ask(prompt_of(random, prompt), output, cap)


def thinking(seed: int = 0, cap: int = 16_000) -> Iterator[Ask]:
    """Models that think before they answer: outputs of 8,000 tokens on average, log-normal."""
    random = np.random.default_rng(seed)
    while True:
        prompt = int(np.clip(random.lognormal(np.log(600) - 0.5, 1.0), 8, 4000))
        output = int(np.clip(random.lognormal(np.log(8000) - 0.125, 0.5), 16, cap))
        yield Ask(prompt_of(random, prompt), output, cap)


def sharegpt(path: Path, seed: int = 0, cap: int = CAP) -> Iterator[Ask]:
    """Pairs of lengths from a JSON file, [[prompt, output], ...], again and again in random order."""
    pairs = json.loads(path.read_bytes())
    random = np.random.default_rng(seed)
    while True:
        for at in random.permutation(len(pairs)):
            prompt, output = pairs[at]
            yield Ask(prompt_of(random, max(1, prompt)), max(1, min(output, cap)), cap)


def drift(seed: int = 0, cap: int = CAP, every: int = 400) -> Iterator[Ask]:
    """Outputs of 200 to 600 tokens and, after every so many requests, ten times as long, and back."""
    random = np.random.default_rng(seed)
    for at in count():
        times = 10 if at // every % 2 else 1
        yield Ask(prompt_of(random, int(random.integers(100, 1000))), int(random.integers(200, 600)) * times, cap)


def bursts(seed: int = 0, cap: int = CAP, rate: float = 2.0, size: int = 60, seconds: float = 20.0) -> Iterator[Ask]:
    """Poisson arrivals, and every so many seconds `size` requests at once; for two minutes."""
    random = np.random.default_rng(seed)
    lengths, at, next_burst = reasoning(seed, cap), 0.0, seconds
    while at < 120:
        at += float(random.exponential(1 / rate))
        if at > next_burst:
            yield from (next(lengths)._replace(at=next_burst) for _ in range(size))
            next_burst += seconds
        yield next(lengths)._replace(at=at)


def chats(seed: int = 0, cap: int = CAP, people: int = 80, turns: int = 6, system: int = 1500) -> list[list[Ask]]:
    """Conversations: one of three system prompts of `system` tokens, then turns of 20 to 200 tokens with answers of 50
    to 400. A turn's prompt is to be put behind all that came before."""
    random = np.random.default_rng(seed)
    systems = [prompt_of(random, system) for _ in range(3)]
    conversations = []
    for person in range(people):
        begin = systems[int(random.integers(3))]
        asks = []
        for turn in range(turns):
            words = prompt_of(random, int(random.integers(20, 200)))
            prompt = np.concatenate([begin, words]) if turn == 0 else words
            asks.append(Ask(prompt, int(random.integers(50, 400)), cap, at=float(person) * 0.25, chat=person))
        conversations.append(asks)
    return conversations
