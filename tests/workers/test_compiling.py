"""Compiling ahead goes through every size of every kind of model; what it compiles, one tiny server shows."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiollm.workers.compiling import meanwhile
from aiollm.workers.shapes import SHAPES

# What they run in has no interpreter, which tests of kernels turn on for the whole process.
EVERY = """
import torch
from aiollm.kernels.device import H100
from aiollm.workers import compiling
from aiollm.workers.families.registry import describe
from aiollm.workers.shapes import SHAPES
from aiollm.workers.sizes import sizes
from aiollm.workers.tp import possible_sizes
from aiollm.kernels.ops import triton_ops
launched = compiling.launches
compiling.launches = lambda facts, jobs: launched(facts, compiling=False)
for name, config in SHAPES.items():
    spec = describe(config)[0]
    for ranks in [size for size in possible_sizes(spec) if size <= 2]:
        every = sizes(20, 100)
        server = compiling.Server(spec, torch.bfloat16, triton_ops(), ranks - 1, ranks, 20, 512, 100, every)
        compiling.compile_ahead(server, H100)
        print(name, ranks)
"""
TINY = """
import contextlib
import sys
import torch
from triton.runtime.jit import JITFunction
from aiollm.kernels.device import H100
from aiollm.kernels.ops import triton_ops
from aiollm.workers import compiling
from aiollm.workers.compiling import Server, compile_ahead
from aiollm.workers.families.registry import describe
from aiollm.workers.shapes import SHAPES
from aiollm.workers.sizes import sizes
config = SHAPES[sys.argv[1]] | {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 500, "sliding_window": 16,
}
longest = int(sys.argv[2])
launched = compiling.launches

@contextlib.contextmanager
def some(facts, jobs):
    with launched(facts, jobs=jobs) as compiled:
        run = JITFunction.run
        JITFunction.run = lambda self, *args, **given: run(self, *args, **given) if self.__name__ in sys.argv else None
        yield compiled

if len(sys.argv) > 3:
    compiling.launches = some
compile_ahead(Server(describe(config)[0], torch.bfloat16, triton_ops(), 0, 1, 2, longest, 14, sizes(2, 14)), H100)
"""
LEAN = """
import sys
import torch
from aiollm.kernels.device import H100
from aiollm.kernels.ops import triton_ops
from aiollm.workers import compiling
from aiollm.workers.families.registry import describe
from aiollm.workers.shapes import SHAPES
from aiollm.workers.sizes import sizes
launched = compiling.launches
compiling.launches = lambda facts, jobs: launched(facts, compiling=False)
spec = describe(SHAPES[sys.argv[1]])[0]
compiling.compile_ahead(compiling.Server(spec, torch.bfloat16, triton_ops(), 0, 1, 20, 512, 100, sizes(20, 100)), H100)
print(*sorted({"sympy", "torch._dynamo"} & sys.modules.keys()))
"""
KERNELS = {
    "_inputs", "_embedding", "_plan_decode", "_gemv", "_few_rows", "_rotary_store", "_decode", "_plan", "_attend",
    "_statistics", "_finish", "_store", "_report", "_norm",
}  # fmt: skip


def run(code: str, cache: Path, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_size_of_a_server_is_gone_through_without_a_device(tmp_path: Path) -> None:
    done = run(EVERY, tmp_path).splitlines()
    assert {line.split()[0] for line in done} == set(SHAPES) and len(done) == 2 * len(SHAPES)


def test_a_second_server_of_the_same_sizes_compiles_nothing(tmp_path: Path) -> None:
    found: list[dict[Path, int]] = []
    for _ in range(2):
        run(TINY, tmp_path, "qwen3-0.6b", "64")
        found.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert found[0] == found[1] and {path.stem for path in found[0]} == KERNELS


def test_tables_of_windows_are_seen_too(tmp_path: Path) -> None:
    """Where the longest sequence is no multiple of 16 tokens, the lines of a window's table begin at other places."""
    run(TINY, tmp_path, "gemma-2-9b", "61", "_inputs")
    assert len(list(tmp_path.rglob("_inputs.cubin"))) == 2


def test_shapes_of_a_common_model_are_known_without_torch_s_compiler(tmp_path: Path) -> None:
    """Importing it takes seconds of a start."""
    assert run(LEAN, tmp_path, "qwen3-0.6b") == "\n"


def test_a_failure_is_told_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("no compiler")

    meanwhile(fails)()
    assert "kernels could not be compiled ahead" in caplog.text and "no compiler" in caplog.text


def test_who_waits_waits_for_the_end() -> None:
    gate, done = threading.Event(), list[int]()

    def work() -> None:
        gate.wait()
        done.append(1)

    wait = meanwhile(work)
    assert not done
    gate.set()
    wait()
    assert done == [1]
