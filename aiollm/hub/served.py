"""Whether workers could serve a model, asked of a process of their kind: the server itself loads none of their code."""

import subprocess
import sys
from pathlib import Path

from aiollm.hub.errors import HubError

SECONDS = 120  # loading torch from a cold disk takes some


def check_served(folder: Path, device: str, ranks: int) -> None:
    """Errors: HubError where the model of `folder`/config.json is not served, or not on `device`, cpu or cuda."""
    command = [sys.executable, "-P", "-m", "aiollm.workers.check", str(folder.absolute())]
    command += ["--device", device, "--ranks", str(ranks)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise HubError(f"torch gave no answer within {SECONDS} s; does nvidia-smi answer?") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        raise HubError(f"a worker could not serve it: {last[0]}")
