"""systemd's side of a service, against a real datagram socket and a real server process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

from aiollm.notify import Notifier, inherited_socket

FLAGS = ("--threads", "1", "--max_total_token_num", "20000", "--drain_timeout", "2")
WAIT = 20  # seconds until a message that does not come fails a test

# Makes a descriptor number 3 and becomes the command, as systemd does.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
"""


class Systemd:
    """The socket to which a service speaks."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def message(self, seconds: float = WAIT) -> str:
        """The next one; TimeoutError where none comes."""
        self._socket.settimeout(seconds)
        return self._socket.recv(65536).decode()

    def until(self, text: str) -> list[str]:
        """Every message up to the first that holds `text`."""
        messages = [self.message()]
        while text not in messages[-1]:
            messages.append(self.message())
            assert len(messages) < 100, messages
        return messages

    def silent(self, seconds: float) -> bool:
        """Whether messages end: after those on the way none comes for so long."""
        try:
            for _ in range(5):
                self.message(seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=8192)
    return write_byte_tokenizer(made)


def test_messages_have_systemds_form(systemd: Systemd) -> None:
    environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "3000000"}
    notifier = Notifier(environ)
    assert environ == {} and notifier.watchdog == 3
    notifier.loading("reading weights", 0.25)
    assert systemd.message() == "STATUS=reading weights 25%\nEXTEND_TIMEOUT_USEC=600000000"
    notifier.loading("reading weights", 0.26)  # so soon after the last one it says nothing
    notifier.loading("warming up", None)
    assert systemd.message().startswith("STATUS=warming up\n")
    notifier.ready("serving a\nb")
    assert systemd.message() == "READY=1\nSTATUS=serving a b"
    notifier.stopping(2.5, "draining")
    assert systemd.message() == "STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=2500000"


def test_an_abstract_address_is_understood() -> None:
    systemd = Systemd(f"@aiollm-test-{os.getpid()}")
    Notifier({"NOTIFY_SOCKET": systemd.address}).status("here")
    assert systemd.message() == "STATUS=here"
    systemd.close()


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready("x")
    asyncio.run(asyncio.wait_for(notifier.watch(lambda: 1), 1))
    assert inherited_socket({}) is None


def test_variables_for_another_process_are_not_ours() -> None:
    assert Notifier({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).watchdog == 0
    assert inherited_socket({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) is None


def test_a_systemd_that_is_gone_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")
    assert "systemd could not be told" in caplog.text


def test_life_is_shown_while_work_moves_or_there_is_none(systemd: Systemd) -> None:
    """The third and fourth looks find the same count: no sign of life."""
    counts = [None, 5, 5, 5, 6, None]
    notifier = Notifier({"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "1000"})

    def progress() -> int | None:
        notifier.status(str(counts[0]))
        return counts.pop(0)

    with pytest.raises(IndexError):  # no look is left
        asyncio.run(notifier.watch(progress))
    messages = [systemd.message() for _ in range(10)]
    life = "WATCHDOG=1"
    assert messages == [
        "STATUS=None", life, "STATUS=5", life, "STATUS=5", "STATUS=5", "STATUS=6", life, "STATUS=None", life,
    ]  # fmt: skip


def test_a_server_tells_of_loading_readiness_and_its_end(systemd: Systemd, folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS, environ={"NOTIFY_SOCKET": systemd.address}) as server:
        *before, ready = systemd.until("READY=1")
        assert before and all("STATUS=" in message and "EXTEND_TIMEOUT_USEC=" in message for message in before)
        assert f"STATUS=serving {folder.name} on {server.url}" in ready
        server.process.send_signal(signal.SIGTERM)
        assert "EXTEND_TIMEOUT_USEC=17000000" in systemd.until("STOPPING=1")[-1]
        assert server.process.wait(WAIT) == 0


def test_a_start_that_fails_is_the_last_status(systemd: Systemd, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiollm", "serve", str(tmp_path / "nowhere"), "--port", "0"]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "NOTIFY_SOCKET": systemd.address}, check=False
    )
    assert done.returncode == 1
    assert "nowhere" in systemd.until("STATUS=")[-1]


def test_signs_of_life_end_when_the_worker_stands_still(systemd: Systemd, folder: Path) -> None:
    environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "1000000"}
    with Server("--model_dir", str(folder), *FLAGS, ready=False, environ=environ) as server:
        systemd.until("READY=1")
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        for _ in range(4):
            assert systemd.message() == "WATCHDOG=1", "a worker without work is alive"
        body = {"prompt": [1], "max_tokens": 20, "ignore_eos": True}
        thread = threading.Thread(target=server.post, args=("/v1/completions", body), daemon=True)
        thread.start()
        assert systemd.silent(2.0)
        os.kill(worker, signal.SIGCONT)
        assert systemd.message() == "WATCHDOG=1"
        thread.join(WAIT)
        assert not thread.is_alive()


def test_signs_of_life_come_while_a_long_answer_runs(systemd: Systemd, folder: Path) -> None:
    environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "400000"}
    body = {"prompt": [1], "max_tokens": 8000, "ignore_eos": True, "n": 2}
    with Server("--model_dir", str(folder), *FLAGS, "--drain_timeout", "0", ready=False, environ=environ) as server:
        systemd.until("READY=1")
        thread = threading.Thread(target=refused, args=(server, body), daemon=True)
        thread.start()
        for _ in range(5):
            assert systemd.message(2.0) == "WATCHDOG=1"
        assert server.metric("aiollm_num_requests_running") == 2
    thread.join(WAIT)
    assert not thread.is_alive()


def refused(server: Server, body: dict[str, Any]) -> None:
    """A request that the end of the server ends."""
    with pytest.raises((urllib.error.HTTPError, ConnectionError)):
        server.post("/v1/completions", body)


def test_a_server_listens_on_the_socket_that_it_inherits(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        launcher = (sys.executable, "-c", ACTIVATE, str(listening.fileno()), sys.executable)
        fds = (listening.fileno(),)
        with Server("--model_dir", str(folder), *FLAGS, launcher=launcher, pass_fds=fds) as server:
            assert server.url == f"http://127.0.0.1:{listening.getsockname()[1]}"
            answer = server.post("/v1/completions", {"prompt": [1], "max_tokens": 2, "ignore_eos": True})
            assert answer["usage"]["completion_tokens"] == 2
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(WAIT) == 0
        with socket.create_connection(listening.getsockname()):
            pass  # the port stays systemd's


def test_what_is_no_listening_socket_is_refused(folder: Path) -> None:
    with socket.socket() as idle:
        command = [
            sys.executable,
            "-c",
            ACTIVATE,
            str(idle.fileno()),
            sys.executable,
            "-m",
            "aiollm",
            "serve",
            str(folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=(idle.fileno(),), check=False)
    assert done.returncode == 1
    assert "one socket that listens" in done.stderr.splitlines()[-1]
