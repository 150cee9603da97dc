"""Nothing is launched, and what is compiled is found again. In processes of their own: here kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NORM = """
import sys, time, torch
from aiollm.kernels import device, norm
from aiollm.kernels.ahead import META, launches
from aiollm.kernels.variants import Norm
with launches(device.H100, jobs=int(sys.argv[1])) as compiled:
    for width in (64, 128):
        x = torch.empty(3, width, dtype=torch.bfloat16, device=META)
        assert norm.norm(x, Norm(torch.empty(width, dtype=torch.bfloat16, device=META), 1e-6)).shape == x.shape
print(len(compiled))
"""


def run(code: str, cache: Path, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_each_specialisation_is_compiled_once_and_found_by_the_next_process(jobs: str, tmp_path: Path) -> None:
    assert run(NORM, tmp_path, jobs) == "2"
    first = sorted(tmp_path.rglob("*.cubin"))
    assert len(first) == 2
    times = [path.stat().st_mtime_ns for path in first]
    run(NORM, tmp_path, "0")
    again = sorted(tmp_path.rglob("*.cubin"))
    assert again == first and [path.stat().st_mtime_ns for path in again] == times


def test_what_cannot_be_compiled_is_raised_by_the_threads_too(tmp_path: Path) -> None:
    broken = """
import torch, triton, triton.language as tl
from aiollm.kernels import device
from aiollm.kernels.ahead import META, launches
import kernel
try:
    with launches(device.H100, jobs=2):
        kernel.broken[(1,)](torch.empty(4, device=META))
except Exception as error:
    print("raised")
"""
    (tmp_path / "kernel.py").write_text(
        "import triton, triton.language as tl\n@triton.jit\ndef broken(x):\n    tl.store(x, tl.no_such_thing(1))\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{broken}"
    assert run(code, tmp_path / "cache") == "raised"
