"""The user's cache folder, and folders in it that are built once, whole or not at all.

    <cache>/NAME/                 a finished folder; its manifest.json was written last
    <cache>/NAME.lock             held (flock) by whoever builds; the kernel frees it when that process dies
    <cache>/NAME.partial-XXXX/    a build at work: `folder/` becomes NAME, `scratch/` is thrown away

Only the holder of the lock builds, so every `partial` folder that it meets belongs to a dead process.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiollm.hub.errors import HubError

Progress = Callable[[str, float | None], None]
"""Told what happens in a few words, and the finished part from 0 to 1 (None where that is not known)."""

Build = Callable[[Path, Path], None]
"""Fills its first argument, an empty folder; may use the second, another empty one, for what is not kept."""

MANIFEST = "manifest.json"
LAYOUT = 1  # raise it when what builders write changes: older folders are then built again


def cache_dir() -> Path:
    """$AIOLLM_CACHE_DIR, else $XDG_CACHE_HOME/aiollm, else ~/.cache/aiollm. It need not exist yet."""
    chosen, base = os.environ.get("AIOLLM_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return (Path(base) if base else Path("~/.cache").expanduser()) / "aiollm"


def build_once(name: str, source: str, build: Build, progress: Progress) -> Path:
    """The finished folder `name` of the cache, built first if it is missing, damaged, or made from another `source`.

    `source` says in a word what the folder is made from (a hash, a size and time). Finding a finished folder costs
    some file look-ups and works in a read-only cache. Threads and processes that come at once wait for the one that
    builds. A build that fails leaves nothing behind, one that is killed a partial folder for the next to remove.
    Errors: HubError when the cache cannot be written; whatever `build` raises.
    """
    cache = cache_dir()
    target = cache / name
    if is_intact(target, source):
        return target
    _make_writable(cache)
    with _locked(cache / f"{name}.lock", lambda: progress(f"waiting for another process that prepares {name}", None)):
        if is_intact(target, source):
            return target
        for stale in cache.glob(f"{glob.escape(name)}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)  # the download of a killed server may be writing there to its end
        work = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=cache))
        try:
            folder, scratch = work / "folder", work / "scratch"
            folder.mkdir()
            scratch.mkdir()
            build(folder, scratch)
            _seal(folder, source)
            if target.exists():
                target.rename(work / "damaged")
            folder.rename(target)
            _sync(cache)
        except OSError as error:
            raise HubError(
                f"cannot prepare {name} in {cache}: {error}; AIOLLM_CACHE_DIR can name a folder elsewhere"
            ) from error
        finally:
            shutil.rmtree(work)
    return target


def is_intact(folder: Path, source: str) -> bool:
    """Whether `folder` was finished, from `source`, and still holds every file in the size it had then."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_bytes())
        if (manifest["layout"], manifest["source"]) != (LAYOUT, source):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no folder, no manifest, or a manifest that a crash or a person has damaged


def _make_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return
    except OSError as error:
        raise HubError(
            f"the cache folder {cache} cannot be written ({error.strerror}); set AIOLLM_CACHE_DIR to one that can"
        ) from error


def _seal(folder: Path, source: str) -> None:
    """Gets all files onto the disk, then the manifest that vouches for them: a power cut must not leave it alone."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        _sync(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"layout": LAYOUT, "source": source, "files": sizes}, indent=2), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which stays: removing it would let two processes lock two different files."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
