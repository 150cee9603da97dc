"""A server in operation: keys, reloads, the operator's socket and the access log, as an operator meets them."""

import gzip
import http.client
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from children import workers
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

from aiollm.trace import read

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--running_max_req_size", "16")
SECRET = "canary-7f3e"  # stands for what users type


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return write_byte_tokenizer(made)


def drawn(name: str) -> tuple[str, str]:
    """A key, and its line for the file."""
    command = [sys.executable, "-m", "aiollm", "key", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr.strip(), done.stdout


def ask(server: Server, path: str, body: Any = None, key: str = "", **headers: str) -> tuple[int, str]:
    """Status and text; a body is posted, as JSON or as the bytes it is."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **headers} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, given), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def completion(server: Server, key: str = "", **fields: Any) -> int:
    return ask(server, "/v1/completions", {"prompt": "hi", "max_tokens": 3, "ignore_eos": True, **fields}, key)[0]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def hang_up(server: Server, says: str) -> None:
    """SIGHUP, and wait until the log says it once more."""
    before = server.log().count(says)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.log().count(says) > before)


def lines(server: Server) -> list[dict[str, Any]]:
    """The access log so far."""
    return [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]


class Operator(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("admin", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def operate(
    path: Path, method: str, route: str, body: Any = None, read: Callable[[bytes], Any] = json.loads
) -> tuple[int, Any]:
    connection = Operator(path)
    connection.request(method, route, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    try:
        return answer.status, read(answer.read())
    finally:
        connection.close()


def test_keys_are_read_again_while_streams_go_on(folder: Path, tmp_path: Path) -> None:
    (alice, line_a), (bob, line_b) = drawn("alice"), drawn("bob")
    file, settings = tmp_path / "keys.yaml", tmp_path / "aiollm.yaml"
    file.write_text(line_a)
    settings.write_text(f"api_key: [plain]\napi_key_file: {file}\nmodel_dir: {folder}\n")
    with Server("--config", str(settings), *FLAGS) as server:
        assert [completion(server, key) for key in (alice, "plain", bob, "")] == [200, 200, 401, 401]
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(completion, server, alice, max_tokens=1500)
            until(lambda: running(server, alice) == 1)
            file.write_text(line_b.replace("}", ", max_requests: 2, cache_share: 0.3}"))
            changed = settings.read_text().replace("[plain]", "[other]")
            settings.write_text(changed + "log_level: debug\nmax_queue: 7\ncache_share: 0.4\n")
            hang_up(server, "SIGHUP: 2 API keys, log level debug")
            assert [completion(server, key) for key in (alice, "plain", bob, "other")] == [401, 401, 200, 200]
            assert completion(server, bob, n=3) == 400  # its limits too
            assert long.result() == 200  # who was let in goes on
        assert "a new start would change max_queue too" in server.log()
        for text, error in (
            (line_b + line_b, f"{file}: line 2: bob stands there twice, first in line 1"),
            ("bob:\n  sha256: zz\n", f"{file}, line 2: bob: sha256 must be 64 hexadecimal digits"),
            ("bob: [", f"{file}: line 1: "),
        ):
            file.write_text(text)
            hang_up(server, f"SIGHUP changes nothing: {error}")
            assert completion(server, bob) == 200
        file.unlink()
        hang_up(server, f"SIGHUP changes nothing: --api_key_file {file}: No such file")
        settings.write_text("nonsense: 1")
        hang_up(server, "SIGHUP changes nothing: the settings have an error")
        assert "unknown setting nonsense" in server.log()
        settings.write_text(f"model_dir: {folder}\n")
        hang_up(server, "SIGHUP changes nothing: a server that asks for API keys goes on to")
        assert [completion(server, key) for key in (bob, "other", "")] == [200, 200, 401]
        assert {line["key"] for line in lines(server)} == {"alice", "bob", "1", None}
        assert not any(key in server.log() for key in (alice, bob))


def running(server: Server, key: str) -> float:
    figures = ask(server, "/metrics", key=key)[1].splitlines()
    return float(next(line for line in figures if line.startswith("aiollm_num_requests_running")).split()[1])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "No such file"),
        ("a: {sha256: 1}\n", "line 1: a: sha256 must be 64 hexadecimal digits"),
        ("- a\n", "it must be a mapping"),
    ],
)
def test_a_bad_file_of_keys_stops_the_start(tmp_path: Path, text: str | None, error: str) -> None:
    file = tmp_path / "keys.yaml"
    if text is not None:
        file.write_text(text)
    command = [sys.executable, "-m", "aiollm", "serve", "--port", "0", "--api_key_file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and error in done.stderr and str(file) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "listening" not in done.stderr


def test_an_empty_file_of_keys_lets_nobody_in(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("# none yet\n")
    with Server("--model_dir", str(folder), *FLAGS, "--api_key_file", str(file)) as server:
        assert completion(server) == 401 and completion(server, "any") == 401
        said = f"WARNING aiollm: {file} holds no keys: nobody is served"
        assert server.log().count(said) == 1
        hang_up(server, said)
        key, line = drawn("alice")
        file.write_text(line)
        hang_up(server, "SIGHUP: 1 API keys")
        assert completion(server, key) == 200 and server.log().count(said) == 2


@pytest.fixture(scope="module")
def operated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    path = tmp_path_factory.mktemp("run") / "admin.sock"
    with Server("--model_dir", str(folder), *FLAGS, "--admin_socket", str(path)) as server:
        yield server, path


def test_the_operator_drains_flushes_and_sets_the_log_level(operated: tuple[Server, Path]) -> None:
    server, path = operated
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert completion(server, prompt="a prompt that is kept") == 200
    assert operate(path, "GET", "/state")[1]["slots"]["cached"] > 20
    assert operate(path, "POST", "/flush")[1]["tokens"] > 20
    state = operate(path, "POST", "/drain")[1]
    assert state["state"] == "draining" and state["slots"]["cached"] == 0
    assert ask(server, "/ready")[0] == completion(server) == 503
    assert operate(path, "POST", "/resume")[1]["state"] == "ready"
    assert completion(server) == 200
    assert operate(path, "POST", "/log_level", {"level": "warning"})[0] == 200
    quiet = server.log()
    assert completion(server) == 200 and server.log() == quiet
    hang_up(server, "SIGHUP: 0 API keys, log level info")
    assert completion(server) == 200
    until(lambda: server.log() != quiet)


def test_a_trace_is_taken_from_a_running_server(operated: tuple[Server, Path], tmp_path: Path) -> None:
    server, path = operated
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(completion, server, max_tokens=1500)
        until(lambda: operate(path, "GET", "/state")[1]["running"] == 1)
        status, events = operate(path, "POST", "/trace", {"seconds": 0.5})
        assert status == 200
        assert long.result() == 200
    (tmp_path / "trace.json").write_text(json.dumps(events))
    found = read(tmp_path / "trace.json")
    assert len(found) > 3 and all(iteration.rows == 1 for iteration in found)
    assert all(iteration.no_work_us == 0 for iteration in found[1:])  # rows from before are known
    assert operate(path, "POST", "/trace", {"seconds": 0.01})[0] == 200


def test_a_profile_is_taken_of_a_running_server_and_ends_with_its_worker(operated: tuple[Server, Path]) -> None:
    server, path = operated

    def profile(steps: int) -> tuple[int, Any]:
        return operate(path, "POST", "/profile", {"steps": steps}, lambda data: data)

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(completion, server, max_tokens=1500)
        until(lambda: operate(path, "GET", "/state")[1]["running"] == 1)
        status, data = profile(3)
        assert status == 200 and long.result() == 200
        events = json.loads(gzip.decompress(data))["traceEvents"]
        names = {event.get("name") for event in events}
        computed = "aten::linear" in names or "kernel" in {event.get("cat") for event in events}  # in a graph
        assert computed, names
        idle = pool.submit(profile, 200)
        until(lambda: operate(path, "GET", "/state")[1]["profiling"])
        (worker,) = workers(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        status, data = idle.result()
        assert status == 500 and b"signal 9" in data
        until(lambda: operate(path, "GET", "/state")[1]["state"] == "ready")
        assert completion(server) == 200


def test_a_worker_that_takes_another_s_place_tells_how_long_that_took(operated: tuple[Server, Path]) -> None:
    server, _ = operated
    before = server.log().count("ready after")
    (worker,) = workers(server.process.pid)
    killed = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    until(lambda: server.log().count("ready after") > before)
    told = re.findall(r"ready after ([\d.]+) s", server.log())
    assert float(told[-1]) <= time.monotonic() - killed + 0.1


def test_the_socket_outlives_no_server_and_a_killed_one_is_followed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    flags = ("--model_dir", str(folder), *FLAGS, "--admin_socket", str(path))
    with Server(*flags) as server:
        command = [sys.executable, "-m", "aiollm", "serve", "--port", "0", *flags]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1 and "a server listens there; see --admin_socket" in second.stderr
        assert operate(path, "GET", "/state")[0] == 200
        server.process.kill()
        server.process.wait()
    assert path.exists()
    with Server(*flags) as server:
        with ThreadPoolExecutor(1) as pool:
            trace = pool.submit(operate, path, "POST", "/trace", {"seconds": 60})
            until(lambda: operate(path, "GET", "/state")[1]["tracing"])
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0  # a trace keeps nobody waiting
            assert trace.result()[0] == 200
        assert not path.exists()


@pytest.mark.parametrize("flags", [(), ("--log_prompts",), ("--access_log", "off")])
def test_prompts_are_in_no_log_unless_that_is_asked_for(folder: Path, flags: tuple[str, ...]) -> None:
    message = {"role": "user", "content": SECRET}
    with Server("--model_dir", str(folder), *FLAGS, "--log_level", "debug", *flags) as server:
        good = [
            ("/v1/completions", {"prompt": SECRET, "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": [message], "max_tokens": 2}),
            ("/v1/completions", {"prompt": SECRET, "max_tokens": 2, "stream": True, "stop": [SECRET]}),
            ("/generate", {"inputs": SECRET, "parameters": {"max_new_tokens": 2}}),
            ("/generate_stream", {"inputs": SECRET, "parameters": {"max_new_tokens": 2}}),
        ]
        for path, body in good:
            assert ask(server, path, body)[0] == 200, path
        for path, bad in (
            ("/v1/completions", {"prompt": SECRET, "max_tokens": SECRET}),
            ("/v1/completions", {"prompt": SECRET, "model": SECRET}),
            ("/v1/completions", {"prompt": SECRET * 1000}),
            ("/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]}),
            ("/v1/chat/completions", f'{{"messages": "{SECRET}'.encode()),
            (f"/v1/models?q={SECRET}", None),
        ):
            assert ask(server, path, bad, **{"X-Request-Id": f"{SECRET} {SECRET}"})[0] < 500
        found = lines(server)
        logged = [line["prompt"] for line in found if "prompt" in line]
        assert len(found) == (0 if "off" in flags else 11)
        if flags == ("--log_prompts",):
            assert len(logged) == len(good) and all(SECRET in prompt for prompt in logged)
        else:
            assert SECRET not in server.log() and not logged


def test_a_server_ends_with_its_terminal_but_not_under_nohup(folder: Path) -> None:
    own = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0);"
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    start = "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    for before, ends in (("", True), (nohup, False)):
        master, slave = pty.openpty()
        launcher = (sys.executable, "-c", own + before + start, str(slave))
        with Server("--model_dir", str(folder), *FLAGS, launcher=launcher, pass_fds=[slave]) as server:
            hang_up(server, "SIGHUP: 0 API keys")  # the terminal is there: somebody wants a reload
            os.close(slave)
            os.close(master)
            if ends:
                assert server.process.wait(20) == 0
                assert "draining" in server.log()
            else:
                hang_up(server, "SIGHUP: 0 API keys")
                assert completion(server) == 200
