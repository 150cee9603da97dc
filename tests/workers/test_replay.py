"""A record of a real worker process, with a death in it, run again in this process."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from crew import crew_of, until
from llguidance._lib import LLParserLimits
from overlap import LateThreads, ListInbox, ListOutbox, start
from tiny_model import write_tiny_model
from updates import begin

from aiollm.fleet.record import FROM_WORKER, TO_WORKER, Recorder
from aiollm.grammar import llguidance
from aiollm.wire.columns import ints, pack
from aiollm.wire.messages import (
    FromWorker,
    Ready,
    Result,
    Setup,
    Update,
    WorkerSettings,
    encoder,
    from_worker_decoder,
)
from aiollm.wire.sampling import Grammar, SamplingParams
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers import replay
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decisions
from aiollm.workers.load import load, stream_of
from aiollm.workers.loop import Loop
from aiollm.workers.runner import Begun, ModelRunner
from aiollm.workers.staging import views
from aiollm.workers.step import Step

PROMPTS = [[(n * i + n) % 97 for i in range(5 + n)] for n in range(1, 5)]
Messages = list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs: requests that lose their worker, and end under the next one."""
    folder = tmp_path_factory.mktemp("record")
    write_tiny_model(folder / "model")

    async def serve() -> None:
        async with crew_of(folder / "model", record=folder / "record") as crew:
            await crew.ready()
            await crew.ask(PROMPTS[:2], 10)
            answers = crew.submit(PROMPTS, 80)
            await until(lambda: all(len(answer.ids) > 5 for answer in answers))
            os.kill(crew.fleet.pids[0], signal.SIGKILL)
            await crew.ended(answers)

    asyncio.run(serve())
    return folder / "record"


def rewritten(record: Path, path: Path, change: Callable[[Messages], Messages]) -> str:
    """A changed copy of a record."""
    recorder = Recorder(str(path))
    for direction, body in change(list(replay.read(record))):
        recorder.keep(direction, body)
    recorder.close()
    return str(path)


def is_result(direction: int, body: bytes) -> bool:
    return direction == FROM_WORKER and isinstance(from_worker_decoder.decode(body), Result)


def iterations(line: str) -> int:
    return int(line.split(": ")[1].split()[0])


def epoch_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]


def test_every_token_comes_out_as_recorded(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(str(record), None, None) == 0
    lines = epoch_lines(capsys)
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2"]
    assert all(", 0 differ, logprobs within 0" in line for line in lines)
    tokens = sum(
        len(ints(message.tokens))
        for direction, body in replay.read(record)
        if direction == FROM_WORKER and isinstance(message := from_worker_decoder.decode(body), Result)
    )
    assert sum(int(line.split(" s, ")[1].split()[0]) for line in lines) == tokens >= 4 * 80


def test_a_record_that_was_cut_off_is_replayed_as_far_as_it_goes(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = record.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) * 2 // 3])
    assert replay.main(str(tmp_path / "cut"), None, None) == 0
    assert ", 0 differ" in epoch_lines(capsys)[0]


def test_a_replay_runs_into_the_iteration_that_the_worker_did_not_survive(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was sent and never answered is computed behind the last answer."""

    def until_the_second_answer(messages: Messages) -> Messages:
        answers = [at for at, (direction, body) in enumerate(messages) if is_result(direction, body)]
        return messages[: answers[1]]

    path = rewritten(record, tmp_path / "unanswered", until_the_second_answer)
    assert replay.main(path, None, None) == 0
    (line,) = epoch_lines(capsys)
    assert iterations(line) > 1


def test_another_token_is_told_and_fails_the_replay(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_another_token(messages: Messages) -> Messages:
        for at, (direction, body) in enumerate(messages):
            if direction == FROM_WORKER and isinstance(message := from_worker_decoder.decode(body), Result):
                tokens = ints(message.tokens).tolist()
                if message.header.iteration == 5:
                    changed = msgspec.structs.replace(message, tokens=pack([(tokens[0] + 1) % 97, *tokens[1:]]))
                    messages[at] = (direction, encoder.encode(changed))
                    return messages
        raise AssertionError("the record is too short")

    path = rewritten(record, tmp_path / "changed", with_another_token)
    assert replay.main(path, None, None) == 1
    lines = epoch_lines(capsys)
    assert ", 1 differ" in lines[0] and "; first: iteration 5, row " in lines[0]
    assert ", 0 differ" in lines[1]


def test_another_folder_may_hold_the_model(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And with another model other tokens come out."""
    other = write_tiny_model(tmp_path, seed=1)
    assert replay.main(str(record), "cpu", str(other)) == 1
    assert not any(", 0 differ" in line for line in epoch_lines(capsys))


class Recorded(ListInbox, ListOutbox):
    """Both sides of a worker's wire, with a record of it. A grammar is built at each third result, or look for one."""

    def __init__(self, path: Path, threads: LateThreads, *messages: Setup | Ready | Update) -> None:
        ListInbox.__init__(self, [message for message in messages if isinstance(message, Update)], [])
        ListOutbox.__init__(self)
        self.recorder, self.threads, self.looks = Recorder(str(path)), threads, 0
        for message in messages:
            self.recorder.keep(FROM_WORKER if isinstance(message, Ready) else TO_WORKER, encoder.encode(message))

    def put(self, message: FromWorker) -> None:
        self.recorder.keep(FROM_WORKER, encoder.encode(message))
        self.look()

    def quiet(self, seconds: float) -> bool:
        self.look()
        return True

    def look(self) -> None:
        self.looks += 1
        if self.looks % 3 == 0:
            self.threads.complete()


def test_rows_that_wait_for_their_grammars_join_the_iterations_that_they_joined_then(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a free row, and alone; and their lexers were full now and then."""
    pieces = [*(bytes([32 + id]) for id in range(96)), b"<end>"]
    vocabulary = Vocabulary(pieces, special=[96], eos=[96])
    settings = WorkerSettings(folder=str(record.parent / "model"), data_type="fp32", rows=4, slots=400, threads=1)
    runner, ready = load(settings, lambda loading: None)
    grammar = Grammar("regex", "([ab]*a[ab]{6}c){9}")
    updates = [begin(1, 0, [3, 4, 5], credit=30, outputs=31)]
    for row in (1, 2, 3):
        sampling = SamplingParams(constraints=(grammar,), seed=row, stop_ids=(96,))
        slot = 100 * row
        updates.append(begin(row + 1, row, [row] * 5, first_slot=slot, credit=60, outputs=60, sampling=sampling))
    steps: list[tuple[list[int], list[int]]] = []
    original = ModelRunner.begin

    def kept(self: ModelRunner, step: Step) -> Begun:
        if step.updates or steps:  # and no warming up
            columns = views(step.staged.buffer, step.staged.places)
            steps.append((columns["token_rows"].tolist(), columns["positions"].tolist()))
        return original(self, step)

    monkeypatch.setattr(ModelRunner, "begin", kept)
    threads = LateThreads()
    wire = Recorded(tmp_path / "record", threads, Setup(1, settings, vocabulary), ready, *updates)
    constraints = Constraints(vocabulary, ready.vocabulary, threads)
    stream = stream_of(settings)
    loop = Loop(
        1, 4, wire, wire, stream, runner, runner.staging, Decisions(), constraints, runner.mask_staging
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(llguidance, "LIMITS", LLParserLimits(max_lexer_states=100, verbose_errors=False))
        patch.setattr(Constraints, "lasting", 1)
        start(loop)()
    wire.recorder.close()
    headers = [
        message.header
        for direction, body in replay.read(tmp_path / "record")
        if direction == FROM_WORKER and isinstance(message := from_worker_decoder.decode(body), Result)
    ]
    assert {len(ints(header.waiting)) for header in headers} >= {0, 3}
    assert any(header.held for header in headers)
    then = steps.copy()
    steps.clear()
    assert replay.main(str(tmp_path / "record"), None, None) == 0
    (line,) = epoch_lines(capsys)
    assert ", 0 differ, logprobs within 0" in line and steps == then


def test_an_epoch_that_never_became_ready_is_left_out(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(record, tmp_path / "setup", lambda messages: messages[:1])
    assert replay.main(path, None, None) == 0
    assert epoch_lines(capsys) == []
