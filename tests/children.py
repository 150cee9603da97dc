"""The worker processes of a process, whichever of its threads started them, and waiting for what others do."""

import time
from collections.abc import Callable
from pathlib import Path


def workers(pid: int) -> list[int]:
    """Process ids of the workers that run now."""
    found = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [int(child) for child in found if alive(int(child)) and b"aiollm.workers" in _command(child)]


def alive(pid: int) -> bool:
    """Whether the process is there and has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
