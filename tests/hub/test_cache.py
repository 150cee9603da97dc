"""A folder of the cache is built once, and is whole or absent, whatever happens to whoever builds it."""

import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from aiollm.hub.cache import MANIFEST, build_once, cache_dir, is_intact
from aiollm.hub.errors import HubError

TEXT = "weights"


def quiet(message: str, part: float | None) -> None:
    pass


def build(folder: Path, scratch: Path) -> None:
    (scratch / "download").write_text("thrown away")
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_text(TEXT)
    (folder / "b").write_bytes(b"")


def never(folder: Path, scratch: Path) -> None:
    raise AssertionError("built again")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AIOLLM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache/aiollm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/aiollm")
    monkeypatch.setenv("AIOLLM_CACHE_DIR", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_a_folder_is_built_once_and_nothing_else_stays(cache: Path) -> None:
    folder = build_once("model", "v1", build, quiet)
    assert folder == cache / "model"
    assert (folder / "inner/a").read_text() == TEXT
    assert build_once("model", "v1", never, quiet) == folder
    assert sorted(path.name for path in cache.iterdir()) == ["model", "model.lock"]


def test_another_source_replaces_the_folder(cache: Path) -> None:
    build_once("model", "v1", build, quiet)
    build_once("model", "v2", lambda folder, _: (folder / "c").touch(), quiet)
    assert sorted(path.name for path in (cache / "model").iterdir()) == ["c", MANIFEST]


@pytest.mark.parametrize("damage", ["shorter", "missing", "no manifest", "odd manifest", "list manifest"])
def test_a_damaged_folder_is_built_again(cache: Path, damage: str) -> None:
    folder = build_once("model", "v1", build, quiet)
    match damage:
        case "shorter":
            (folder / "inner/a").write_text(TEXT[:-1])
        case "missing":
            (folder / "b").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "odd manifest":
            (folder / MANIFEST).write_text('{"layout":')
        case "list manifest":
            (folder / MANIFEST).write_text(json.dumps([1]))
    assert not is_intact(folder, "v1")
    build_once("model", "v1", build, quiet)
    assert is_intact(folder, "v1")
    assert (folder / "inner/a").read_text() == TEXT


@pytest.mark.parametrize("error", [RuntimeError("conversion"), KeyboardInterrupt()])
def test_an_interrupted_build_leaves_nothing_and_the_next_succeeds(cache: Path, error: BaseException) -> None:
    def fail(folder: Path, scratch: Path) -> None:
        build(folder, scratch)
        raise error

    with pytest.raises(type(error)):
        build_once("model", "v1", fail, quiet)
    assert [path.name for path in cache.iterdir()] == ["model.lock"]
    assert is_intact(build_once("model", "v1", build, quiet), "v1")


def _die_while_building() -> None:
    def die(folder: Path, scratch: Path) -> None:
        build(folder, scratch)
        os._exit(9)

    build_once("model", "v1", die, quiet)


def test_what_a_killed_process_left_is_removed_by_the_next(cache: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_while_building)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (cache / "model").exists()
    assert len(list(cache.glob("model.partial-*"))) == 1
    build_once("model", "v1", build, quiet)
    assert sorted(path.name for path in cache.iterdir()) == ["model", "model.lock"]


def test_two_at_once_build_once_and_the_second_says_that_it_waits(cache: Path) -> None:
    builds, messages, building, waiting = [], [], threading.Event(), threading.Event()

    def slow(folder: Path, scratch: Path) -> None:
        builds.append(folder)
        building.set()
        assert waiting.wait(10)
        build(folder, scratch)

    def second(message: str, part: float | None) -> None:
        messages.append(message)
        waiting.set()

    first = threading.Thread(target=build_once, args=("model", "v1", slow, quiet))
    first.start()
    assert building.wait(10)
    folder = build_once("model", "v1", slow, second)
    first.join()
    assert len(builds) == 1
    assert messages == ["waiting for another process that prepares model"]
    assert is_intact(folder, "v1")


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AIOLLM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(HubError, match="AIOLLM_CACHE_DIR"):
        build_once("model", "v1", build, quiet)


def test_a_full_disk_names_the_variable(cache: Path) -> None:
    def full(folder: Path, scratch: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(HubError, match=r"No space left.*AIOLLM_CACHE_DIR"):
        build_once("model", "v1", full, quiet)
