"""Starts: what cannot be served ends within seconds with one line that says why; odd machines are served."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from calm import FLAGS, until
from crew import listening
from safetensors.torch import save_file
from serving import Server

TEXT = "/v1/completions"


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def lack(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def pad(folder: Path) -> None:
    """A header of 200 MB."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(201 << 20)


INDEX = "model.safetensors.index.json"
# what is wrong -> how it is made so, and words of the reason
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lack("config.json"), "config.json"),
    "a configuration that is no JSON": (write("config.json", "{"), "config.json"),
    "no architecture": (lambda folder: change(folder, architectures=None), "architectures"),
    "an unknown architecture": (lambda folder: change(folder, architectures=["NoSuchLM"]), "NoSuchLM"),
    "no weights": (lack("model.safetensors"), "safetensors"),
    "weights that are cut short": (cut, "model.safetensors is damaged"),
    "a header of 200 MB": (pad, "model.safetensors"),
    "a missing shard": (write(INDEX, '{"weight_map": {"a": "model-2.safetensors"}}'), "model-2.safetensors"),
    "an index that is no JSON": (write(INDEX, "{"), "index.json"),
    "other weights": (
        lambda folder: save_file({"a": torch.ones(2)}, folder / "model.safetensors"), "model.embed_tokens",
    ),
    "no tokenizer": (lack("tokenizer.json"), "tokenizer"),
    "a tokenizer that is no JSON": (write("tokenizer.json", "{"), "tokenizer.json"),
    "a chat template that does not compile": (write("chat_template.jinja", "{% if %}"), "template"),
    "sampling defaults out of range": (write("generation_config.json", '{"temperature": -1}'), "temperature"),
}  # fmt: skip


@pytest.fixture(scope="module")
def endings(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and stderr of each start, all of them together: a start takes seconds."""

    def start(name: str) -> tuple[int, str]:
        copy = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(folder, copy)
        BROKEN[name][0](copy)
        command = [sys.executable, "-m", "aiollm", "serve", "--port", "0", "--model_dir", str(copy), *FLAGS]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return found.returncode, found.stderr

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(BROKEN, pool.map(start, BROKEN), strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_cannot_be_served_is_refused_in_one_line(endings: dict[str, tuple[int, str]], name: str) -> None:
    status, said = endings[name]
    last = said.strip().splitlines()[-1]
    assert status == 1 and last.startswith("aiollm: ") and BROKEN[name][1] in last, said
    assert said.count(last.removeprefix("aiollm: ")) == 1 and "Error: " not in last, said
    assert "Traceback" not in said


@pytest.mark.parametrize("flag", ["--api_key_file", "--record", "--trace", "--admin_socket", "--config"])
def test_a_file_that_cannot_be_opened_is_refused_with_its_flag(folder: Path, tmp_path: Path, flag: str) -> None:
    command = [sys.executable, "-m", "aiollm", "serve", "--port", "0", "--model_dir", str(folder), *FLAGS]
    missing = str(tmp_path / "missing" / "file")
    found = subprocess.run([*command, flag, missing], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode in (1, 2)
    (said,) = [line for line in found.stderr.splitlines() if line.startswith("aiollm: ")]
    assert flag in said and missing in said and "No such file" in said


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_other_addresses_of_this_machine_are_listened_at(folder: Path, host: str) -> None:
    with Server("--model_dir", str(folder), "--host", host, ready=False) as server:
        assert server.get("/health")[0] == 200


def test_an_address_that_is_not_there_is_refused_before_the_model_is_looked_for() -> None:
    for host in ("no.such.host.invalid", "192.0.2.1", "2001:db8::1"):
        command = [sys.executable, "-m", "aiollm", "serve", "--host", host, "--port", "0", "--model_dir", "/nowhere"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 1
        assert f"cannot listen on {host} port 0" in found.stderr.splitlines()[-1] and "--host" in found.stderr


def test_a_log_that_cannot_be_written_costs_lines_and_nothing_else(folder: Path) -> None:
    """As on a full disk; the server is found by the port that it was given."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "aiollm", "serve", "--port", str(port), "--model_dir", str(folder), *FLAGS]
    with Path("/dev/full").open("w") as full, subprocess.Popen(command, stderr=full) as process:
        until(lambda: ready(port) or process.poll() is not None, 120)
        body = b'{"prompt": "x", "max_tokens": 3, "ignore_eos": true}'
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{TEXT}", body, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        process.terminate()
        assert process.wait(60) == 0


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_machine_without_home_and_temporary_folder_is_served(folder: Path) -> None:
    nowhere = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent/cache"}
    with Server("--model_dir", str(folder), *FLAGS, environ=nowhere) as server:
        assert server.post(TEXT, {"prompt": "x", "max_tokens": 3})["usage"]["completion_tokens"] > 0
        assert "Traceback" not in server.log()


def test_code_that_came_with_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    copy, ran = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(folder, copy)
    change(copy, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "configuration.Config"})
    for name in ("modeling", "configuration", "tokenization", "torch", "numpy"):
        (copy / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    launcher = [sys.executable, "-c", f"import os, sys; os.chdir({str(copy)!r}); os.execv(sys.argv[1], sys.argv[1:])"]
    for flags in ([], ["--trust_remote_code"]):
        with Server("--model_dir", str(copy), *FLAGS, *flags, launcher=[*launcher, sys.executable, "-P"]) as server:
            assert server.post(TEXT, {"prompt": "x", "max_tokens": 3})["usage"]["completion_tokens"] > 0
        assert not ran.exists()


def test_two_ranks_listen_nowhere_but_at_the_servers_port_and_use_no_named_memory(folder: Path) -> None:
    """What containers give for /dev/shm is 64 MB; nothing there means that nothing can be full, or left behind."""
    with Server("--model_dir", str(folder), *FLAGS, "--device", "cpu", "--tp", "2") as server:
        server.post(TEXT, {"prompt": "x", "max_tokens": 3})
        pids = [server.process.pid, *server.workers()]
        assert len(pids) == 3
        assert listening([server.process.pid]) == {"0100007F"}
        assert listening(pids) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        for pid in pids:
            assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()
            open_files = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
            assert not any(name.startswith("/dev/shm") for name in open_files)


def test_a_start_that_fails_does_so_soon(folder: Path) -> None:
    """Before weights are loaded, so whatever their size: the port is the first thing that is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "aiollm", "serve", "--port", port, "--model_dir", str(folder)]
        began = time.monotonic()
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1 and "--port" in found.stderr and "loading" not in found.stderr
    assert time.monotonic() - began < 20
