"""A trace is whole at any moment, and tells gaps from times without work."""

import asyncio
import json
import os
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from crew import crew_of, until
from tiny_model import write_tiny_model
from updates import begin

from aiollm.fleet.fleet import Fleet
from aiollm.fleet.trace import DEVICE, RECEIVED, SENT, TRACKS, TraceFile, Tracer
from aiollm.trace import read, share
from aiollm.wire.columns import pack
from aiollm.wire.messages import HINT_LENGTH, HINT_NONE, Failed, Header, Result, Update


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Traced:
    """A tracer, and what its file holds after every call."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.json"
        self.clock = Clock()
        self.tracer = Tracer(str(self.path), self.clock)
        self.tracer.begin(1)
        self.iteration = 0

    def send(self, update: Update) -> None:
        self.tracer.sent(update, 100)
        self.events()

    def result(self, applied: int, rows: dict[int, int], idle: int = 0, device: int = 1000, epoch: int = 1) -> None:
        """`rows` are hints by row, all of generation 1."""
        self.iteration += 1
        header = Header(epoch, self.iteration, self.iteration, applied, device, idle, b"")
        ones = pack([1] * len(rows))
        self.tracer.received(Result(header=header, rows=pack([*rows]), generations=ones, hints=bytes(rows.values())))
        self.events()

    def events(self, track: int = 0, phase: str = "X") -> list[dict[str, Any]]:
        found = json.loads(self.path.read_bytes())
        return [event for event in found if track in (0, event["tid"]) and event["ph"] == phase]

    def device(self) -> list[tuple[str, float, float]]:
        """(name, begin, length) on the device's track, in order of time."""
        return sorted(((e["name"], e["ts"], e["dur"]) for e in self.events(DEVICE)), key=lambda event: event[1])


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    return Traced(tmp_path)


def test_idle_time_is_a_gap_only_beside_rows_with_work(traced: Traced) -> None:
    traced.send(begin(1, 0, [1, 2, 3], outputs=3))
    traced.clock.now += 0.010
    traced.result(1, {0: HINT_NONE}, device=2000)
    traced.clock.now += 0.0013
    traced.result(1, {0: HINT_NONE}, idle=300)
    traced.clock.now += 0.0015
    traced.result(1, {0: HINT_LENGTH}, idle=500)
    traced.clock.now += 0.200
    traced.send(begin(2, 1, [1, 2], retire=[0]))
    traced.clock.now += 0.003
    traced.result(2, {1: HINT_NONE}, idle=202_000)
    assert [name for name, _, _ in traced.device()] == [
        "mixed 1 + 3", "gap", "decode 1", "gap", "decode 1", "no work", "mixed 1 + 2",
    ]  # fmt: skip
    ends = [at + length for _, at, length in traced.device()]
    begins = [at for _, at, _ in traced.device()]
    assert ends[:-1] == pytest.approx(begins[1:]), "they lie end to end"
    assert begins[0] == pytest.approx(8000) and begins[2] == pytest.approx(10_300)
    found = read(traced.path)
    assert [iteration.gap_us for iteration in found] == [0, 300, 500, 0]
    assert [iteration.no_work_us for iteration in found] == [0, 0, 0, 202_000]
    assert share(found) == pytest.approx(800 / 5000)


def test_a_trace_that_begins_later_knows_the_rows_that_run(traced: Traced) -> None:
    traced.tracer.begin(1, {0: 1})
    for hint in (HINT_NONE, HINT_LENGTH, HINT_NONE):
        traced.clock.now += 0.01
        traced.result(7, {0: hint}, idle=300)
    assert [iteration.gap_us for iteration in read(traced.path)] == [300, 300, 0]  # the row is at its end


def test_a_row_that_waits_for_its_next_chunk_makes_a_gap(traced: Traced) -> None:
    traced.send(begin(1, 0, [1] * 8))
    traced.clock.now += 1
    traced.result(1, {})
    traced.send(Update(number=2, chunk_rows=pack([0]), chunk_starts=pack([8]), chunk_counts=pack([4])))
    traced.clock.now += 1
    traced.result(2, {0: HINT_NONE}, idle=5000)
    assert [name for name, _, _ in traced.device()] == ["prefill 8", "gap", "mixed 1 + 4"]


def test_updates_and_the_iterations_that_applied_them_are_tied(traced: Traced) -> None:
    traced.send(begin(1, 0, [1, 2, 3]))
    traced.send(Update(number=2, retire=pack([4, 5])))
    traced.clock.now += 0.01
    traced.result(2, {0: HINT_NONE})
    assert [(e["name"], e["args"]["retired"], e["args"]["chunk_tokens"]) for e in traced.events(SENT)] == [
        ("update 1", 0, 3), ("update 2", 2, 0),
    ]  # fmt: skip
    sent, applied = traced.events(SENT, "s"), traced.events(DEVICE, "f")
    assert [event["id"] for event in sent] == [event["id"] for event in applied] == ["1.1", "1.2"]
    (iteration,) = traced.events(DEVICE)
    assert iteration["args"]["applied"] == 2 and traced.events(RECEIVED)[0]["args"]["behind_device_us"] == 0
    assert {e["args"]["name"] for e in traced.events(phase="M")} == {"aiollm", *TRACKS.values()}


def test_no_iteration_ends_after_its_result_came_and_drift_is_put_right(traced: Traced) -> None:
    traced.send(begin(1, 0, [1], outputs=100))
    traced.clock.now += 1
    traced.result(1, {0: HINT_NONE})
    traced.clock.now += 0.001
    traced.result(1, {0: HINT_NONE}, device=5000)  # more than has passed
    traced.clock.now += 0.010
    traced.result(1, {0: HINT_NONE}, device=8000)  # less: the loop was late
    traced.clock.now += 10
    traced.result(1, {0: HINT_NONE}, device=8000)
    drawn = [(round(at), round(at + length)) for _, at, length in traced.device()]
    assert drawn == [
        (999_000, 1_000_000), (1_000_000, 1_001_000), (1_001_000, 1_009_000), (11_003_000, 11_011_000),
    ]  # fmt: skip
    assert [iteration.device_us for iteration in read(traced.path)] == [1000, 5000, 8000, 8000], "as the device said"


def test_a_new_epoch_starts_from_nothing(traced: Traced) -> None:
    traced.send(begin(1, 0, [1], outputs=100))
    traced.tracer.begin(2)
    traced.result(1, {0: HINT_NONE})
    assert traced.device() == [], "a result of the epoch before"
    traced.clock.now += 1
    traced.result(0, {}, idle=700, epoch=2)
    assert [name for name, _, _ in traced.device()] == ["no work", "decode 0"]


def test_a_failed_iteration_says_so(traced: Traced) -> None:
    none = pack([])
    failed = Failed(
        header=Header(1, 1, 1, 0, 10, 0, pack([3])), rows=none, generations=none, starts=none, counts=none, error="bad"
    )
    traced.tracer.received(failed)
    (event,) = traced.events(DEVICE)
    assert (event["name"], event["args"]["error"], event["args"]["stalled"]) == ("failed 0", "bad", 1)


def test_the_file_is_whole_after_every_event_and_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(str(path), {"n": 0})
    for number in range(1, 5):
        file.add([{"n": number}, {"text": "x" * number}])
        assert json.loads(path.read_bytes())[-2]["n"] == number
    real, calls = os.pwrite, []

    def short(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        return real(fd, data[:4] if len(calls) == 1 else data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    file.add([{"n": 5}])
    assert len(json.loads(path.read_bytes())) == 9 and "the trace ends here" in caplog.text
    file.add([{"n": 6}])
    file.close()
    assert len(json.loads(path.read_bytes())) == 9 and len(caplog.messages) == 1


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Tracer(str(tmp_path / "missing" / "trace.json"))


def test_real_workers_are_traced_through_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "model")
    path = tmp_path / "trace.json"
    monkeypatch.setattr("crew.Fleet", partial(Fleet, trace=str(path)))

    async def main() -> None:
        async with crew_of(folder) as crew:
            await crew.ready()
            await crew.ask([[1, 2, 3], [4, 5, 6, 7]], 20)
            answers = crew.submit([[5] * 9], 300)
            await until(lambda: len(answers[0].ids) > 20)
            os.kill(crew.fleet.pids[0], signal.SIGKILL)
            await crew.ended(answers)

    asyncio.run(main())
    events = json.loads(path.read_bytes())
    iterations = read(path)
    assert {event["args"]["epoch"] for event in events if "epoch" in event.get("args", {})} == {1, 2}
    assert sum(iteration.rows for iteration in iterations) >= 2 * 20 + 300 - 1
    assert sum(iteration.chunk_tokens for iteration in iterations) >= 3 + 4 + 9
    assert all(iteration.device_us > 0 for iteration in iterations)
    assert all(after.at >= before.at for before, after in pairwise(iterations))
