"""Launch parameters that were measured, as data: one JSON file for each kernel, GPU and minor version of Triton.

    kernels/tuned/GPU/KERNEL.triton-3.6.json         in the package; other versions count where this one has none
    <user's cache>/tuned/GPU/KERNEL.triton-3.6.json  what this user's tuner found; of equally near keys it comes first

A host function asks `lookup`, which never tunes: that would stop a running server for minutes. Tuning happens in
`autotune`, by hand (`aiollm tune`) or when a worker starts, as $AIOLLM_TRITON_AUTOTUNE_LEVEL says:

    0  what is stored (default)                        1  a starting worker tunes the keys that nothing is stored for
    2  a starting worker tunes all of its keys anew    3  nothing stored is read: every kernel has its defaults

A kernel's name here is that of its module, whose CANDIDATES the tuner tries. In a key an integer is a size, and the
entry whose sizes are nearest is taken; what must be equal (a dtype, a head's width) is written as a string. So each
candidate must give right results for every key.
"""

import contextlib
import contextvars
import fcntl
import functools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from aiollm.kernels import device

Key = Mapping[str, int | str]
Config = dict[str, int]
Asked = tuple[Any, ...]  # the kernel, then (name, value) of each part of the key

LEVEL = "AIOLLM_TRITON_AUTOTUNE_LEVEL"
SHIPPED = Path(__file__).parent / "tuned"
TRITON = ".".join(triton.__version__.split(".")[:2])


class Entry(NamedTuple):
    """A measured result; `us` is the time of one call with `config` in microseconds."""

    key: dict[str, int | str]
    config: Config
    us: float


_found: dict[Asked, Config] = {}  # what was looked up since the last `forget`
_forced: contextvars.ContextVar[Mapping[str, Config] | None] = contextvars.ContextVar("forced", default=None)


def lookup(kernel: str, key: Key, default: Config) -> Config:
    """The launch parameters of `kernel` for `key`: those stored for the nearest key, else `default`.

    The same kernel and key must come with the same default. The result is shared: do not change it. A repeated lookup
    costs less than a microsecond. Errors: ValueError for a malformed file or level.
    """
    asked = (kernel, *key.items())
    found = _found.get(asked)
    if found is None:
        found = _found[asked] = _chosen(kernel, key, default)
    return found


def level() -> int:
    """0 to 3; see the module's text."""
    text = os.environ.get(LEVEL, "0")
    if text not in ("0", "1", "2", "3"):
        raise ValueError(f"{LEVEL} is 0, 1, 2 or 3, not {text!r}")
    return int(text)


def forget() -> None:
    """Read the files again at the next lookup."""
    _found.clear()
    stored.cache_clear()
    borrowed.cache_clear()


@contextlib.contextmanager
def trial(forced: Mapping[str, Config]) -> Iterator[dict[Asked, Config]]:
    """Within, nothing stored counts: kernels get what `forced` names for them, whatever the key, or their defaults.

    Yields a dict that fills with what is looked up: (kernel, *key.items()) -> parameters. For the tuner, in one thread.
    """
    _found.clear()
    token = _forced.set(forced)
    try:
        yield _found
    finally:
        _forced.reset(token)
        _found.clear()


@functools.cache
def stored(kernel: str, gpu: str) -> list[Entry]:
    """What is stored for a kernel on a GPU (`device.name`) and this Triton: the user's entries, then the package's."""
    return [entry for root in (user_folder(), SHIPPED) for entry in read(path(root, kernel, gpu))]


@functools.cache
def borrowed(kernel: str, gpu: str) -> list[Entry]:
    """What the package has for other minor versions of Triton, the newest first.

    Another version's pipelining may take more shared memory than there is: ours are compiled with each version that is
    tried (tests/kernels/test_aot.py), a user's are not, and do not count.
    """
    files = SHIPPED.glob(f"{gpu}/{kernel}.triton-*.json")
    return [entry for file in sorted(files, key=_minor, reverse=True) for entry in read(file)]


def save(root: Path, kernel: str, gpu: str, facts: Mapping[str, str], entries: Sequence[Entry]) -> Path:
    """Put `entries` in the place of those with the same keys in the kernel's file below `root`; returns the file.

    `facts` (GPU, driver, versions, date) stand at the head of the file. Processes that store at once wait for each
    other. Errors: OSError where the folder cannot be written, ValueError where the file there or an entry is malformed.
    """
    file = path(root, kernel, gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked("writing"):
        new_ones = [_entry(entry._asdict(), f"for {kernel}: an entry") for entry in entries]
        merged = {tuple(sorted(entry.key.items())): entry for entry in [*read(file), *new_ones]}
        lines = ",\n".join("    " + json.dumps(merged[key]._asdict()) for key in sorted(merged, key=str))
        head = json.dumps(dict(facts), indent=2)[:-2]
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(f'{head},\n  "entries": [\n{lines}\n  ]\n}}\n')
        os.chmod(new.name, 0o644)
        os.replace(new.name, file)
    forget()
    return file


@contextlib.contextmanager
def locked(what: str) -> Iterator[None]:
    """Wait until no other process of this user holds the lock of that name, and hold it within."""
    user_folder().mkdir(parents=True, exist_ok=True)
    with open(user_folder() / f"{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(file: Path) -> list[Entry]:
    """The entries of one file; none where it does not exist. Errors: ValueError names the file and the bad field."""
    try:
        content: Any = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}; delete or repair it") from error
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{file}: entries is no list; delete or repair the file")
    return [_entry(value, f"{file}: entries[{i}]") for i, value in enumerate(entries)]


def path(root: Path, kernel: str, gpu: str) -> Path:
    """Where the entries of a kernel lie below `root` for this version of Triton."""
    return root / gpu / f"{kernel}.triton-{TRITON}.json"


def user_folder() -> Path:
    """`tuned` in $AIOLLM_CACHE_DIR, else in $XDG_CACHE_HOME/aiollm, else in ~/.cache/aiollm."""
    chosen, base = os.environ.get("AIOLLM_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute() / "tuned"
    return (Path(base) if base else Path("~/.cache").expanduser()) / "aiollm" / "tuned"


def distance(key: Key, other: Key) -> float:
    """How far two keys lie apart: the sum of the sizes' ratios in powers of two; infinite where a string differs."""
    if key.keys() != other.keys():
        return math.inf
    total = 0.0
    for name, value in key.items():
        theirs = other[name]
        if isinstance(value, int) and isinstance(theirs, int):
            total += abs(math.log2((value + 1) / (theirs + 1)))
        elif value != theirs:
            return math.inf
    return total


def _chosen(kernel: str, key: Key, default: Config) -> Config:
    forced = _forced.get()
    if forced is not None:
        return forced.get(kernel, default)
    if level() == 3:
        return default
    gpu = device.name(device.current())
    return _nearest(key, stored(kernel, gpu), default) or _nearest(key, borrowed(kernel, gpu), default) or default


def _nearest(key: Key, entries: Sequence[Entry], default: Config) -> Config | None:
    """Of equally near entries the first one; other names than the default's are of another version of the kernel."""
    fitting = [entry for entry in entries if entry.config.keys() == default.keys()]
    near = min(fitting, key=lambda entry: distance(key, entry.key), default=None)
    return near.config if near and distance(key, near.key) < math.inf else None


def _minor(file: Path) -> tuple[int, ...]:
    """The version in the name of a file: KERNEL.triton-3.6.json."""
    return tuple(int(part) for part in file.name.removesuffix(".json").rpartition("-")[2].split("."))


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"key", "config", "us"}:
        raise ValueError(f"{where} holds other fields than key, config and us")
    key, config, us = value["key"], value["config"], value["us"]
    if not isinstance(key, dict) or not all(isinstance(v, str) or (type(v) is int and v >= 0) for v in key.values()):
        raise ValueError(f"{where}.key holds something else than strings and integers from 0 up")
    if not isinstance(config, dict) or not config or not all(isinstance(v, int) for v in config.values()):
        raise ValueError(f"{where}.config is no object of integers")
    if not isinstance(us, int | float) or not us > 0:
        raise ValueError(f"{where}.us is no positive number")
    return Entry(key, config, float(us))
