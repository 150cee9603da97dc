"""Real worker processes under a real engine: kill -9, bad checkpoints, stops. Two ranks: test_ranks.py."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crew import Crew, alive, continuation, crew_of, listening, until
from tiny_model import write_tiny_model

from aiollm.fleet.fleet import STOP_SECONDS
from aiollm.wire.messages import Alive, FromWorker, Result, encoder
from aiollm.workers import replay

PROMPTS = [[(n * i + n) % 97 for i in range(5 + n)] for n in range(1, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def crew(folder: Path, runner: asyncio.Runner) -> Iterator[Crew]:
    """One that lasts for several tests; its workers may be killed."""

    async def begin() -> Crew:
        crew = Crew(folder)
        await crew.ready()
        return crew

    crew = runner.run(begin())
    yield crew
    crew.engine.check_integrity()
    runner.run(crew.fleet.stop())


def test_tokens_are_those_of_transformers(folder: Path, crew: Crew, runner: asyncio.Runner) -> None:
    answers = runner.run(crew.ask(PROMPTS[:3], 12))
    assert answers == [continuation(folder, prompt, 12) for prompt in PROMPTS[:3]]


def test_a_worker_waits_for_what_it_is_to_load(folder: Path, runner: asyncio.Runner) -> None:
    async def main() -> None:
        async with crew_of(folder, starts=False) as crew:
            pids = crew.fleet.pids
            assert len(alive(pids)) == 1 and crew.engine.phase == "starting"
            for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group: they are the server's to answer
                os.kill(pids[0], number)
            crew.fleet.start()
            await crew.ready()
            assert crew.fleet.pids == pids
        async with crew_of(folder, starts=False) as crew:
            pids = crew.fleet.pids
        assert alive(pids) == []

    runner.run(main())


def test_a_worker_that_says_that_it_is_well_is_heard(crew: Crew) -> None:
    before = crew.engine.signs
    crew.fleet._on_message(0, encoder.encode(Alive()), Alive())
    assert crew.engine.signs == before + 1


def test_a_big_prompt_goes_through_the_arena(folder: Path, crew: Crew, runner: asyncio.Runner) -> None:
    prompt = [i * i % 97 for i in range(3500)]
    (link,) = crew.fleet._links

    async def ask() -> list[int]:
        (answer,) = crew.submit([prompt], 3)
        await until(lambda: link.arena.used)
        await crew.ended([answer])
        return answer.ids

    assert runner.run(ask()) == continuation(folder, prompt, 3)
    assert link.arena.used == 0, "the headers of the results free it"


def test_workers_listen_nowhere(crew: Crew) -> None:
    assert listening(crew.fleet.pids) == set()


def test_signals_to_the_whole_group_leave_workers_to_the_server(crew: Crew, runner: asyncio.Runner) -> None:
    (pid,) = crew.fleet.pids
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    runner.run(crew.ask([[1, 2, 3]], 5))
    assert crew.fleet.pids == [pid]


def test_a_killed_worker_costs_no_token_and_repeats_none(crew: Crew, runner: asyncio.Runner) -> None:
    async def disturbed() -> list[list[int]]:
        answers = crew.submit(PROMPTS, 300)
        await until(lambda: all(len(answer.ids) > 20 for answer in answers))
        assert not any(answer.finish for answer in answers)
        os.kill(crew.fleet.pids[0], signal.SIGKILL)
        await crew.ended(answers)
        assert {answer.finish.reason for answer in answers if answer.finish} == {"length"}
        return [answer.ids for answer in answers]

    undisturbed = runner.run(crew.ask(PROMPTS, 300))
    (pid,) = crew.fleet.pids
    assert runner.run(disturbed()) == undisturbed
    assert crew.fleet.pids != [pid]
    assert alive([pid]) == []


def test_a_second_death_fails_the_request_and_nobody_else(crew: Crew, runner: asyncio.Runner) -> None:
    async def twice() -> None:
        (unlucky,) = crew.submit([PROMPTS[0]], 3000)
        for _ in range(2):
            seen = len(unlucky.ids)
            await until(lambda seen=seen: len(unlucky.ids) > seen)  # type: ignore[misc]
            os.kill(crew.fleet.pids[0], signal.SIGKILL)
            await until(lambda: crew.engine.state == "loading")
        (patient,) = crew.submit([PROMPTS[1]], 5)
        await crew.ended([unlucky, patient])
        assert unlucky.finish is not None and patient.finish is not None
        assert unlucky.finish.error == "the worker process died twice under this request"
        assert patient.finish.reason == "length"

    runner.run(twice())


def test_a_death_beyond_the_limit_stops_everything_and_leaves_nothing(folder: Path) -> None:
    async def die() -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        async with crew_of(folder, max_restarts=0) as crew:
            await crew.ready()
            (answer,) = crew.submit([PROMPTS[0]], 3000)
            await until(lambda: answer.ids)
            pids = crew.fleet.pids
            os.kill(pids[0], signal.SIGKILL)
            await until(lambda: crew.stopped)
        assert crew.stopped == [
            "a worker process was ended by signal 9 (Killed), perhaps for want of memory; that was death 1,"
            " see --max_restarts"
        ]
        assert crew.engine.status.state == "stopped" and crew.engine.status.error == crew.stopped[0]
        assert answer.finish is not None and answer.finish.error == crew.stopped[0]
        assert alive(pids) == []
        assert sorted(os.listdir("/proc/self/fd")) == before

    asyncio.run(die())


def test_a_worker_that_stands_still_for_good_is_replaced_and_no_token_is_lost(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with crew_of(folder, step_timeout=4.0) as crew:
            await crew.ready()
            expected = await crew.ask(PROMPTS, 600)
            os.kill(crew.fleet.pids[0], signal.SIGSTOP)  # what the kernel ends all the same
            pids = crew.fleet.pids
            assert await crew.ask(PROMPTS, 600) == expected
            assert alive(pids) == [] and crew.engine.state == "ready"

    asyncio.run(main())
    assert "nothing came from the worker for 4 s, see --step_timeout; starting it again" in caplog.text


def test_a_worker_that_starts_again_is_told_so(folder: Path, tmp_path: Path) -> None:
    """Its pool has to be that of the first one, whatever memory others took meanwhile."""

    async def die() -> None:
        async with crew_of(folder, record=tmp_path / "record") as crew:
            await crew.ready()
            os.kill(crew.fleet.pids[0], signal.SIGKILL)
            await until(lambda: crew.engine.state == "loading")
            await crew.ready()

    asyncio.run(die())
    found = [epoch.setup.settings for epoch in replay.epochs(tmp_path / "record")]
    assert [(settings.again, settings.slots) for settings in found] == [(False, 4000), (True, 4000)]


def test_a_stop_amid_requests_leaves_no_process_and_no_descriptor(folder: Path) -> None:
    async def stop() -> None:
        before, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
        async with crew_of(folder) as crew:
            await crew.ready()
            answers = crew.submit(PROMPTS, 600)
            await until(lambda: all(answer.ids for answer in answers))
            pids, processes = crew.fleet.pids, [link.process for link in crew.fleet._links]
        assert alive(pids) == []
        assert [process.returncode for process in processes] == [0], "it left by itself"
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() == threads
        assert not crew.stopped

    asyncio.run(stop())


def test_a_stop_while_loading_does_not_wait_for_the_load(folder: Path) -> None:
    async def stop() -> None:
        before = sorted(os.listdir("/proc/self/fd"))
        async with crew_of(folder) as crew:
            (process,) = (link.process for link in crew.fleet._links)
            assert alive([process.pid]) == [process.pid]
            began = time.monotonic()
        assert time.monotonic() - began < STOP_SECONDS / 2
        assert process.returncode == -signal.SIGKILL
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert not crew.stopped, "nothing failed"

    asyncio.run(stop())


def test_a_checkpoint_that_cannot_be_served_is_the_reason_given(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())

    async def fail() -> None:
        async with crew_of(tmp_path) as crew:
            await until(lambda: crew.stopped)
            assert len(crew.stopped) == 1
            assert "model.safetensors" in crew.stopped[0]
            assert crew.engine.status.error == crew.stopped[0]
            assert alive(crew.fleet.pids) == []

    asyncio.run(fail())
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_that_cannot_be_started_again_is_the_reason_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        async with crew_of(folder) as crew:
            await crew.ready()

            def refuse(*arguments: object, **others: object) -> None:
                raise OSError("too many open files")

            monkeypatch.setattr("aiollm.fleet.link.subprocess.Popen", refuse)
            os.kill(crew.fleet.pids[0], signal.SIGKILL)
            await until(lambda: crew.stopped)
            assert crew.stopped[0].endswith("it cannot be started again: too many open files")

    asyncio.run(fail())


def test_a_result_that_the_engine_cannot_take_starts_a_new_epoch(
    folder: Path, crew: Crew, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing hangs and no token is lost: the requests go on in a new group."""
    original, broken = crew.engine.on_message, [ValueError("a mistake of ours")]

    def fail_once(message: FromWorker) -> None:
        if broken and isinstance(message, Result):
            raise broken.pop()
        original(message)

    monkeypatch.setattr(crew.engine, "on_message", fail_once)
    assert runner.run(crew.ask(PROMPTS[:2], 12)) == [continuation(folder, prompt, 12) for prompt in PROMPTS[:2]]
    assert not broken
