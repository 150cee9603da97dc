"""What each part may load: every module without a GPU, the server without torch, --help in a blink."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tree import HEAVY, MODULES, ROOMS, room

WORKER_ROOMS = {"workers", "kernels"}
HELP_SECONDS = 0.3

# Imports the modules named on stdin; prints the failures, and which libraries were loaded in the end.
IMPORT = """
import importlib, json, sys, traceback
failures = {}
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except BaseException:
        failures[name] = traceback.format_exc()
print(json.dumps({"failures": failures, "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def imported(names: list[str], folder: Path) -> tuple[dict[str, str], set[str]]:
    """Failures by module and the top-level names loaded, of a fresh interpreter that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        input=json.dumps(names),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["failures"], set(answer["loaded"])


def in_rooms(rooms: set[str]) -> list[str]:
    return sorted(name for name in MODULES if room(name) in rooms)


def test_every_module_imports_with_no_device_visible(tmp_path: Path) -> None:
    assert imported(in_rooms(WORKER_ROOMS), tmp_path)[0] == {}


def test_the_server_loads_neither_torch_nor_the_workers(tmp_path: Path) -> None:
    failures, loaded = imported(in_rooms({"aiollm", *ROOMS} - WORKER_ROOMS), tmp_path)
    assert failures == {}
    assert loaded & HEAVY == set()


def test_aiollm_itself_loads_nothing_before_something_of_it_is_used(tmp_path: Path) -> None:
    source = "import sys; before = set(sys.modules); import aiollm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if not name.startswith("__editable__")] == ["aiollm"]


def test_a_program_with_a_model_loads_neither_torch_nor_the_workers(tmp_path: Path) -> None:
    source = "import sys; from aiollm import LLM, AsyncLLM, SamplingParams; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "aiollm.offline.llm" in loaded
    assert not loaded & HEAVY and not any(room(name) in WORKER_ROOMS for name in loaded if name.startswith("aiollm"))


def test_the_list_of_modules_is_not_empty() -> None:
    assert {"aiollm.config", "aiollm.engine.engine", "aiollm.hub.resolve", "aiollm.text.tokenizer"} <= set(MODULES)
    assert {"aiollm.workers.loop", "aiollm.kernels.ops"} <= set(MODULES)


def test_a_worker_on_a_cpu_does_without_triton(tmp_path: Path) -> None:
    """It is not installed beside a CPU build of torch."""
    failures, loaded = imported(["aiollm.workers.__main__", "aiollm.workers.load", "aiollm.kernels.ops"], tmp_path)
    assert failures == {} and "triton" not in loaded


@pytest.mark.parametrize("module", ["aiollm", "aiollm.workers"])
def test_help_works_from_any_directory(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_help_takes_a_blink(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "aiollm", "--help"], cwd=tmp_path, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # CPU time of the quickest: what others do on the machine does not count.
    assert min(seconds) < HELP_SECONDS
