"""A real server in a process of its own, for tests and tools: started, asked, killed and stopped as a user would."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Server:
    """`with Server("--model_dir", folder) as server:` listens on a free port and is ready inside the block."""

    def __init__(
        self,
        *flags: str,
        ready: bool = True,
        environ: dict[str, str] | None = None,
        launcher: Sequence[str] = (sys.executable,),
        program: Sequence[str] = ("-m", "aiollm", "serve", "--port", "0"),
        pass_fds: Sequence[int] = (),
        patience: float = 600,
    ) -> None:
        """`launcher` is what runs Python, by itself or in a while; it inherits `pass_fds`. `program` says on stderr
        "listening on URL". A server that is not there after `patience` seconds is a RuntimeError."""
        self.flags = flags
        self._program = program
        self._launcher, self._pass_fds = launcher, pass_fds
        self._ready = ready
        self._patience = patience
        self._environ = environ or {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        self.url = ""

    def __enter__(self) -> "Server":
        command = [*self._launcher, *self._program, *self.flags]
        environ = {**os.environ, **self._environ}
        self.process = subprocess.Popen(command, stderr=self._log, env=environ, pass_fds=self._pass_fds)
        try:
            self._started(time.monotonic() + self._patience)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()

    def _started(self, deadline: float) -> None:
        while not self.url:
            line = next((line for line in self.log().splitlines() if line.startswith("listening on ")), "")
            self.url = line.split()[2].rstrip(";") if line else ""
            self._wait(deadline)
        while self._ready and not self._is_ready():
            self._wait(deadline)

    def _is_ready(self) -> bool:
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False  # it is ending, or has ended: `_wait` sees that

    def _wait(self, deadline: float) -> None:
        if self.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{self.log()}")
        time.sleep(0.02)

    def log(self) -> str:
        """What the server wrote on stderr so far."""
        self._log.flush()
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text()

    def get(self, path: str, timeout: float = 30) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """The JSON answer; raises urllib.error.HTTPError for a refusal."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.partition("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def workers(self) -> list[int]:
        """Process ids of the workers that run now."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split() if b"aiollm.workers" in _command(pid)]

    def memory(self) -> int:
        """Resident set of the server now, in bytes."""
        return _status(self.process.pid, "VmRSS")

    def workers_memory(self) -> int:
        """Resident sets of all workers now, in bytes."""
        return sum(_status(pid, "VmRSS") for pid in self.workers())

    def peak_memory(self) -> int:
        """Largest resident set of any worker so far, in bytes."""
        return max(_status(pid, "VmHWM") for pid in self.workers())


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def _status(pid: int, key: str) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10
