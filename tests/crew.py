"""Engine, fleet and real worker processes on a tiny model, wired as the server wires them."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import torch
from tiny_model import in_fp32

from aiollm.engine.engine import Engine, Settings
from aiollm.engine.policy import Conservative, Policy
from aiollm.engine.request import Finish, PromptToken, Request, Token
from aiollm.fleet.fleet import Fleet
from aiollm.wire.messages import WorkerSettings
from aiollm.wire.sampling import SamplingParams

SECONDS = 60  # what takes longer hangs


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


class Answer:
    """A sink that keeps what came."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.finish: Finish | None = None

    def token(self, token: Token) -> str | None:
        assert self.finish is None
        self.ids.append(token.id)
        return None

    def prompt_tokens(self, tokens: list[PromptToken]) -> None:
        raise AssertionError("nobody asked for them")

    def finished(self, finish: Finish) -> None:
        assert self.finish is None
        self.finish = finish


def greedy(prompt: Sequence[int], tokens: int) -> Request:
    """A request for a greedy continuation, with an `Answer`."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    return Request("r", np.array(prompt, np.int64), sampling, Answer(), time.monotonic())


def answer_of(request: Request) -> Answer:
    assert isinstance(request.sink, Answer)
    return request.sink


class Crew:
    def __init__(
        self,
        folder: Path,
        *,
        ranks: int = 1,
        max_restarts: int = 9,
        step_timeout: float = 60.0,
        record: Path | None = None,
        device: str = "cpu",
        slots: int = 4000,
        policy: Policy | None = None,
        starts: bool = True,
    ) -> None:
        """Without `starts` its workers are not told yet what to load."""
        self.engine = Engine(Settings(8, 2048, 2048, True, policy or Conservative(), 100, queue_tokens=100 * 2048))
        self.stopped: list[str] = []
        self.fleet = Fleet(
            self.engine,
            WorkerSettings(
                folder=str(folder), data_type="fp32", device=device, rows=8, slots=slots, ranks=ranks, threads=1
            ),
            max_restarts,
            step_timeout,
            str(record) if record else None,
            on_stopped=self.stopped.append,
        )
        self.fleet.spawn()
        if starts:
            self.fleet.start()

    async def ready(self) -> None:
        await until(lambda: self.engine.state == "ready" or self.stopped)
        assert not self.stopped, self.stopped

    def submit(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """Ask for greedy continuations."""
        requests = [greedy(prompt, tokens) for prompt in prompts]
        self.engine.submit(*requests)
        return [answer_of(request) for request in requests]

    async def ended(self, answers: Sequence[Answer]) -> None:
        await until(lambda: all(answer.finish is not None for answer in answers))

    async def ask(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        answers = self.submit(prompts, tokens)
        await self.ended(answers)
        assert {answer.finish for answer in answers} == {Finish("length")}
        return [answer.ids for answer in answers]


@asynccontextmanager
async def crew_of(folder: Path, **settings: object) -> AsyncIterator[Crew]:
    crew = Crew(folder, **settings)  # type: ignore[arg-type]
    try:
        yield crew
    finally:
        await crew.fleet.stop()


def alive(pids: Sequence[int]) -> list[int]:
    """Those that are still processes, zombies among them."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def listening(pids: Sequence[int]) -> set[str]:
    """Addresses (in hexadecimal) on which processes listen for TCP."""
    inodes = set()
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            _, local, _, state, *others = line.split()
            if state == "0A" and others[5] in inodes:
                found.add(local.split(":")[0])
    return found


def continuation(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """What transformers answers, greedily."""
    torch.set_num_threads(1)  # 33 times faster than two threads beside a worker on two cores
    model = in_fp32(folder)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]
