"""A worker from its Setup to its end, in this process; as a process of its own: tests/fleet."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model
from updates import begin

from aiollm.wire.arena import Arena
from aiollm.wire.columns import ints
from aiollm.wire.framing import FrameReader, FrameWriter
from aiollm.wire.messages import (
    Fatal,
    FromWorker,
    Loading,
    Ready,
    Result,
    Setup,
    Stop,
    ToWorker,
    Update,
    WorkerSettings,
    encoder,
    from_worker_decoder,
)
from aiollm.workers.__main__ import main, serve
from aiollm.workers.decisions import Decisions

SECONDS = 30
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


class Server:
    """The server's ends of a worker that runs on a thread."""

    def __init__(self, folder: Path) -> None:
        self.setup = Setup(4, WorkerSettings(folder=str(folder), rows=4, slots=400, threads=1))
        self.arena = Arena.create(1 << 16)
        self.theirs, self.to = os.pipe()
        self.source, self.outbox = os.pipe()
        os.set_blocking(self.source, False)
        self.writer, self.reader = FrameWriter(self.to, self.arena), FrameReader(self.source)
        self.heard: list[FromWorker] = []
        self.status: int | None = None
        self._ends = {self.theirs, self.to, self.source, self.outbox}
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        self.status = serve(self.theirs, self.outbox, self.arena.fd, Decisions())
        self.close(self.outbox)

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.writer.send(encoder.encode(message), message.number if isinstance(message, Update) else 0)
        self.writer.flush_blocking()

    def start(self) -> None:
        self._thread.start()

    def hear(self, kind: type[FromWorker]) -> None:
        """Read until a message of this kind has come."""
        while not any(isinstance(message, kind) for message in self.heard):
            assert not self.reader.closed and self.reader.wait(SECONDS)
            self.heard += [from_worker_decoder.decode(body) for body in self.reader.read()]

    def finish(self) -> int | None:
        """The worker's exit status, after all it said."""
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the worker hangs"
        while self.source in self._ends and not self.reader.closed:
            self.heard += [from_worker_decoder.decode(body) for body in self.reader.read()]
        return self.status

    def close(self, *fds: int) -> None:
        for fd in fds or tuple(self._ends):
            self._ends.discard(fd)
            os.close(fd)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.close()
    server.arena.close()


def drawn(heard: list[FromWorker]) -> int:
    return sum(len(ints(message.tokens)) for message in heard if isinstance(message, Result))


def test_progress_then_ready_then_results(server: Server) -> None:
    server.start()
    server.send(server.setup, begin(1, 2, PROMPT, credit=4, outputs=3), Stop())
    assert server.finish() == 0
    kinds = [type(message) for message in server.heard]
    ready = kinds.index(Ready)
    assert set(kinds[:ready]) == {Loading}
    assert set(kinds[ready + 1 :]) <= {Result}


def test_a_prompt_comes_out_of_the_arena(server: Server) -> None:
    server.start()
    server.send(server.setup)
    server.hear(Ready)
    server.send(begin(1, 0, [1] * 350, credit=3, outputs=3), Update(number=2, retire=bytes(10_000)))
    assert server.arena.used == 1
    server.hear(Result)
    server.send(Stop())
    assert server.finish() == 0


def test_a_stop_that_came_with_the_setup_is_heard(server: Server) -> None:
    server.send(server.setup, Stop())
    server.start()
    assert server.finish() == 0
    assert isinstance(server.heard[-1], Ready)


def test_a_server_that_leaves_before_the_setup_is_no_error(server: Server) -> None:
    server.close(server.to)
    server.start()
    assert server.finish() == 0
    assert server.heard == []


def test_a_server_that_leaves_an_idle_worker_is_no_error(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.start()
    server.send(server.setup)
    server.hear(Ready)
    server.close(server.to)
    assert server.finish() == 0
    assert capsys.readouterr().err == ""


def test_a_server_that_dies_amid_results_ends_the_worker(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pipes break, whichever thread writes; the credit that is left is not used up."""
    server.start()
    server.send(server.setup, begin(1, 0, PROMPT, credit=390, outputs=390))
    server.hear(Result)
    server.close(server.to, server.source)
    assert server.finish() == 0
    assert capsys.readouterr().err == ""


def test_a_server_that_dies_while_the_worker_loads_ends_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.send(server.setup)
    server.close(server.source, server.to)
    server.start()
    assert server.finish() == 0
    assert capsys.readouterr().err == ""


def test_a_broken_stream_is_the_last_word_and_leaves_a_traceback(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.start()
    server.send(server.setup, begin(1, 0, PROMPT, credit=2, outputs=9), Update(number=3))
    assert server.finish() == 1
    assert server.heard[-1] == Fatal("ValueError: update 3 arrived after 1")
    assert "Traceback" in capsys.readouterr().err


def test_a_worker_expects_its_setup_first(server: Server) -> None:
    server.start()
    server.send(Stop())
    assert server.finish() == 1
    assert server.heard == [Fatal("the first message is Stop, not Setup")]


def test_a_model_that_cannot_be_loaded_is_the_last_word_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path)
    server.start()
    server.send(server.setup)
    assert server.finish() == 1
    last = server.heard[-1]
    assert isinstance(last, Fatal) and "config.json" in last.error
    assert capsys.readouterr().err == ""
    server.close()
    server.arena.close()


def test_memory_that_runs_out_while_it_loads_is_a_sentence_without_a_traceback(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("aiollm.workers.load.weights.load", full)
    server.start()
    server.send(server.setup)
    assert server.finish() == 1
    last = server.heard[-1]
    assert isinstance(last, Fatal) and "ran out of memory while loading weights" in last.error
    assert capsys.readouterr().err == ""


def test_a_worker_is_not_started_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aiollm.workers"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert "by hand, use --replay FILE" in capsys.readouterr().err
