"""The doctor: what is well, what would be slow, what would fail."""

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny_tokenizer import write_byte_tokenizer

from aiollm import doctor
from aiollm.config import Config
from aiollm.doctor import Devices, Finding

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 99,
    "max_position_embeddings": 128,
}  # fmt: skip
FOREIGN = "names FooForCausalLM, supported: BaiChuanForCausalLM, .*Starcoder2ForCausalLM"


def levels(check: Callable[[Config], Iterator[Finding]], **settings: object) -> dict[str, str]:
    """Text by level; several of one level are joined."""
    found: dict[str, str] = {}
    for level, text in check(Config(**settings)):  # type: ignore[arg-type]
        found[level] = found.get(level, "") + text + "\n"
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks whole from outside, and whose tokenizer can be read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    header = json.dumps({}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    write_byte_tokenizer(folder)
    return folder


def test_a_good_machine_ends_with_0(model: Path, tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin:/bin", "AIOLLM_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "aiollm", "doctor", str(model), "--port", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "", done.stdout
    assert all(line.split()[0] in ("ok", "warn") for line in lines) and "\x1b" not in done.stdout
    for part in ("Python 3.", "torch ", "aiohttp ", "driver: ", "CPUs", "memory: ", "memfd: ", "open files: "):
        assert any(part in line for line in lines), part
    for part in ("locked memory: ", "port 0 of 127.0.0.1: free", "writable", "a folder, complete"):
        assert any(part in line for line in lines), part


def test_anything_that_fails_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [doctor.model, doctor.limits])
    assert doctor.main(Config(model_dir="/nowhere")) == 1
    assert capsys.readouterr().out.startswith("fail  model /nowhere: neither a folder")


def test_a_port_that_is_taken_fails_and_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in levels(doctor.port, port=taken.getsockname()[1])["fail"]


def test_a_server_open_to_others_is_warned_of() -> None:
    assert "--api_key" in levels(doctor.port, host="0.0.0.0", port=0)["warn"]
    assert "warn" not in levels(doctor.port, host="0.0.0.0", port=0, api_key=("k",))
    assert "warn" not in levels(doctor.port, host="127.0.0.1", port=0)


def test_few_open_files_are_warned_of_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 1000))
    assert "ulimit -n 4096" in levels(doctor.limits)["warn"]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1 << 20))
    assert "warn" not in levels(doctor.limits)  # a server takes all that it may


def test_a_cache_that_cannot_be_written_fails_unless_the_model_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "AIOLLM_CACHE_DIR" in levels(doctor.cache)["fail"]
    assert list(levels(doctor.cache, model_dir=str(tmp_path))) == ["warn"]


def test_a_model_is_judged_by_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(tmp_path))
    assert "complete" in levels(doctor.model, model_dir=str(model))["ok"]
    assert "downloads" in levels(doctor.model)["warn"]
    assert "no config.json" in levels(doctor.model, model_dir=str(tmp_path))["fail"]
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "model.safetensors" in levels(doctor.model, model_dir=str(model))["fail"]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in levels(doctor.model, model_dir=str(tmp_path / "x.gguf"))["fail"]


def test_a_model_whose_texts_a_server_could_not_read_fails(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% if %}")
    assert "chat template" in levels(doctor.model, model_dir=str(model))["fail"]
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in levels(doctor.model, model_dir=str(model))["fail"]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_an_architecture_that_is_not_served_is_named_with_those_that_are(model: Path, load_format: str) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["FooForCausalLM"]}))
    found = levels(doctor.model, model_dir=str(model), load_format=load_format)
    assert list(found) == ["fail"] and re.search(FOREIGN, found["fail"])


def test_a_model_of_the_hub_is_judged_by_the_files_that_are_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "not here yet" in levels(doctor.model, model_dir="org/name")["warn"]
    folder = snapshot(tmp_path, LLAMA)
    assert "not all of it is here yet" in levels(doctor.model, model_dir="org/name")["warn"]
    (model / "model.safetensors").rename(folder / "model.safetensors")
    assert list(levels(doctor.model, model_dir="org/name")) == ["ok"]
    snapshot(tmp_path, {"architectures": ["FooForCausalLM"]})
    assert re.search(FOREIGN, levels(doctor.model, model_dir="org/name")["fail"])


def snapshot(cache: Path, config: dict[str, object]) -> Path:
    """org/name in a cache of the hub's client, with config.json alone."""
    model = cache / "models--org--name"
    folder = model / "snapshots" / "0123456789012345678901234567890123456789"
    folder.mkdir(parents=True, exist_ok=True)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(folder.name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_server_says_so_before_it_downloads_the_weights(tmp_path: Path) -> None:
    snapshot(tmp_path, {"architectures": ["FooForCausalLM"]})
    environ = {"PATH": "/usr/bin:/bin", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "aiollm", "serve", "org/name", "--port", "0", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("aiollm: a worker could not serve it: config.json: ") and re.search(FOREIGN, last), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("device", "tp", "names", "bad"),
    [("cpu", 1, [], False), ("cpu", 1, ["H100"], False), ("cuda", 1, [], True), ("cuda", 2, ["H100"], True)],
)
def test_a_device_that_is_missing_fails(
    monkeypatch: pytest.MonkeyPatch, device: str, tp: int, names: list[str], bad: bool
) -> None:
    seen = Devices(torch="2", cuda="12" if names else "", names=names, free=[1 << 30 for _ in names])
    monkeypatch.setattr(doctor, "_probe", lambda: seen)
    found = levels(doctor.devices, device=device, tp=tp)
    assert ("GPUs, a server needs" in found.get("fail", "")) is bad
    assert ("GPU 0: H100, 1.0 GiB free" in found["ok"]) is bool(names)


def test_a_torch_that_cannot_be_loaded_fails_with_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "raise OSError('libcuda is missing')")
    assert "libcuda is missing" in levels(doctor.devices)["fail"]
