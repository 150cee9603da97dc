"""An hour of a busy server in seconds: requests come, go away, are paused and lose their worker, at random.

On a real worker process, with the integrity check after every event; what it was sent is then replayed.
"""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
from crew import Crew, answer_of, continuation, crew_of, greedy, until
from tiny_model import write_tiny_model

from aiollm.engine.policy import Aggressive
from aiollm.engine.request import Request, State
from aiollm.workers import replay

TOKENS = 60  # of the longest answer
SLOTS = 250  # eight rows of the longest kind want 1,400
SYSTEM = [(5 * i) % 97 for i in range(40)]  # what some prompts begin with
PROMPTS = [[*(SYSTEM if n % 3 else []), *((n * i + n) % 97 for i in range(3 + 7 * n))] for n in range(1, 11)]


class Size(NamedTuple):
    requests: int
    deaths: int


SIZES = {"cpu": Size(80, 2), "cuda": Size(4000, 6)}


class Crowd:
    """Who asked, and what may be expected of the answers."""

    def __init__(self, crew: Crew, size: Size, expected: list[list[int]], seed: int) -> None:
        self.crew, self.size, self.expected = crew, size, expected
        self.random = random.Random(seed)
        self.asked: list[tuple[int, Request]] = []
        self.given_up: set[int] = set()
        self.pauses = 0

    @property
    def under_way(self) -> list[int]:
        return [at for at, (_, request) in enumerate(self.asked) if request.state is not State.FINISHED]

    def comes(self) -> None:
        which = self.random.randrange(len(PROMPTS))
        request = greedy(PROMPTS[which], self.random.randint(1, TOKENS))
        self.crew.engine.submit(request)
        self.asked.append((which, request))

    def leaves(self) -> None:
        if self.under_way:
            at = self.random.choice(self.under_way)
            self.given_up.add(at)
            self.crew.engine.abort(self.asked[at][1])

    def is_paused(self) -> None:
        core = self.crew.engine.core
        assert core is not None
        if core.ledger.running:
            core.pause(self.random.choice([row.request for row in core.ledger.running.values()]))
            self.pauses += 1

    async def live(self) -> None:
        """Everybody comes; most stay."""
        deaths = sorted(self.random.sample(range(10, self.size.requests), self.size.deaths))
        while len(self.asked) < self.size.requests:
            (event,) = self.random.choices([self.comes, self.leaves, self.is_paused], [8, 1, 1])
            event()
            self.crew.engine.check_integrity()
            if deaths and len(self.asked) > deaths[0] and self.crew.fleet.pids and self.under_way:
                os.kill(self.crew.fleet.pids[0], signal.SIGKILL)
                deaths.pop(0)
            while len(self.under_way) > 12 or (self.random.random() < 0.5 and self.under_way):
                await asyncio.sleep(0.001)
                self.crew.engine.check_integrity()
        await until(lambda: not self.under_way)
        self.crew.engine.check_integrity()

    def judge(self) -> None:
        """Nobody got a wrong token, and who stayed got all, but for those who lost their worker twice."""
        complete = 0
        for at, (which, request) in enumerate(self.asked):
            answer, wanted = answer_of(request), self.expected[which][: request.sampling.max_tokens]
            assert answer.finish is not None and answer.ids == wanted[: len(answer.ids)]
            if answer.finish.reason == "length":
                assert answer.ids == wanted
                complete += 1
            else:
                assert at in self.given_up or "died twice" in answer.finish.error
        assert complete > 0.7 * len(self.asked)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_crowd_gets_what_it_asked_for_and_its_record_can_be_replayed(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model", max_position_embeddings=512)
    expected = [continuation(folder, prompt, TOKENS) for prompt in PROMPTS]
    size = SIZES[device]

    async def serve() -> Crowd:
        record = tmp_path / "record"
        async with crew_of(folder, record=record, device=device, slots=SLOTS, policy=Aggressive()) as crew:
            await crew.ready()
            crowd = Crowd(crew, size, expected, seed=1)
            await crowd.live()
            core = crew.engine.core
            assert core is not None and core.epoch == 1 + size.deaths
            assert core.paused_total > crowd.pauses > 0, "some found the pool full"
            return crowd

    asyncio.run(serve()).judge()
    assert replay.main(str(tmp_path / "record"), None, None) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(told) == 1 + size.deaths and all(", 0 differ" in line for line in told)
