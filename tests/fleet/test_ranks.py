"""Two ranks as one group."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from crew import alive, continuation, crew_of, listening, until
from tiny_model import write_tiny_model

PROMPTS = [[(n * i + n) % 97 for i in range(5 + n)] for n in range(1, 5)]
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_two_ranks_say_what_one_says_and_share_their_fate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_model(tmp_path)

    async def together(expected: list[list[int]]) -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        async with crew_of(folder, ranks=2) as crew:
            await crew.ready()
            assert await crew.ask(PROMPTS, 100) == expected
            assert listening(crew.fleet.pids) <= LOOPBACK
            victims = crew.fleet.pids
            answers = crew.submit(PROMPTS, 100)
            await until(lambda: all(len(answer.ids) > 10 for answer in answers))
            assert not any(answer.finish for answer in answers)
            os.kill(victims[1], signal.SIGKILL)
            await crew.ended(answers)
            assert [answer.ids for answer in answers] == expected
            assert alive(victims) == []
            assert caplog.messages[-1].startswith("a worker process was ended by signal 9"), (
                "not what rank 0 made of it"
            )
            processes = [link.process for link in crew.fleet._links]
        assert [process.returncode for process in processes] == [0, 0], "a stop lets every rank leave by itself"
        assert sorted(os.listdir("/proc/self/fd")) == before

    asyncio.run(together([continuation(folder, prompt, 100) for prompt in PROMPTS]))


def test_a_group_that_is_killed_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that is killed nobody could remove it, so nothing may be there while it runs."""
    model, temporary = tmp_path / "model", tmp_path / "temporary"
    model.mkdir()
    temporary.mkdir()
    write_tiny_model(model)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)

    async def meet() -> None:
        async with crew_of(model, ranks=2) as crew:
            await crew.ready()
            assert list(temporary.iterdir()) == []

    asyncio.run(meet())


def test_a_group_that_cannot_load_says_why_once(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, num_attention_heads=3, num_key_value_heads=1)

    async def fail() -> None:
        async with crew_of(tmp_path, ranks=2) as crew:
            await until(lambda: crew.stopped)
            assert len(crew.stopped) == 1
            assert "--tp 2 cannot share out 3 query heads, 1 KV heads" in crew.stopped[0]

    asyncio.run(fail())
