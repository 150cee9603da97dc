"""Every kernel is compiled for every card, without one; see kernels/aot.py. Only the last test takes long."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiollm.kernels import aot, device, tuned
from aiollm.kernels.aot import Compiled, Failed, complaints, measured, table

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Path(__file__).parent / "limits.json"
KERNEL = Compiled("norm._norm", "sm_90", "norm 1 rows", "H=64 num_warps=4", 4, 40, 0, 1024, 9000)


def limits(**costs: int) -> dict[str, object]:
    return {"stack": {}, "triton": {tuned.TRITON: {"norm._norm": {"sm_90": costs}}}}


def test_a_kernel_within_its_limits_is_fine() -> None:
    assert list(complaints([KERNEL], limits(registers=40, stack=0, shared=1024))) == []


@pytest.mark.parametrize(("cost", "slack"), aot.SLACK.items())
def test_growth_beyond_the_slack_is_told(cost: str, slack: int) -> None:
    limit = getattr(KERNEL, cost)
    grown = KERNEL._replace(**{cost: limit + slack + 1})
    held = limits(**{cost: limit}) | {"stack": {"norm._norm": "a reason"}}
    (text,) = complaints([grown], held)
    assert text == f"norm._norm for sm_90 takes {limit + slack + 1} {cost}, up from {limit}"
    assert list(complaints([KERNEL._replace(**{cost: limit + slack})], held)) == []


def test_limits_of_another_triton_do_not_hold() -> None:
    others = {"stack": {}, "triton": {"0.1": {"norm._norm": {"sm_90": {"registers": 1}}}}}
    assert list(complaints([KERNEL._replace(stack=8)], others)) == []


def test_a_stack_needs_a_reason() -> None:
    spilling = KERNEL._replace(stack=8)
    (text,) = complaints([spilling], {"stack": {}, "triton": {tuned.TRITON: {}}})
    assert "keeps 8 bytes of each thread in memory" in text
    assert list(complaints([spilling], {"stack": {"norm._norm": "a reason"}, "triton": {tuned.TRITON: {}}})) == []


@pytest.mark.parametrize("target", device.STAND_INS)
def test_shared_memory_must_fit_the_card(target: str) -> None:
    room = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227}[target] * 1024
    free: dict[str, object] = {"stack": {}, "triton": {}}
    assert list(complaints([KERNEL._replace(target=target, shared=room)], free)) == []
    (text,) = complaints([KERNEL._replace(target=target, shared=room + 1)], free)
    assert f"wants {room + 1} bytes of shared memory, a block has {room}" in text


def test_a_failure_is_told_once_with_its_cases() -> None:
    failures = [Failed("norm", "sm_80", label, "ValueError: no") for label in ("1 rows", "2 rows")]
    (text,) = complaints(failures, {"stack": {}, "triton": {}})
    assert text == "norm 1 rows for sm_80 does not compile, nor do 1 other cases: ValueError: no"


def test_written_limits_are_read_again_as_they_were() -> None:
    held = limits(registers=40, stack=8, shared=1024) | {"stack": {"norm._norm": 'a "reason"'}}
    assert json.loads(aot.dumped(held)) == held


def test_what_is_measured_and_shown_is_the_worst_of_the_specialisations() -> None:
    others = [KERNEL._replace(registers=80, shared=0), KERNEL._replace(target="sm_80", registers=10)]
    worst = {"registers": 80, "stack": 0, "shared": 1024}
    assert measured([KERNEL, *others])["norm._norm"]["sm_90"] == worst
    lines = table([KERNEL, *others]).splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["norm._norm", "sm_80", "1", "4", "10"],
        ["norm._norm", "sm_90", "2", "4", "80"],
    ]


def launched() -> set[str]:
    """module.function of every kernel that a host function launches: kernel[grid](...)."""
    found = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        defined = {
            node.name: path.stem
            for node in nodes
            if isinstance(node, ast.FunctionDef) and any(".jit" in ast.unparse(by) for by in node.decorator_list)
        }
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiollm.kernels."):
                defined |= {alias.name: str(node.module).rpartition(".")[2] for alias in node.names}
        calls = [
            node.func.value for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        found |= {f"{defined[name]}.{name}" for name in map(ast.unparse, calls) if name in defined}
    return found


def test_every_kernel_that_is_launched_has_limits() -> None:
    limits = json.loads(LIMITS.read_bytes())["triton"]
    (pinned,) = re.findall(r"^triton==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned in limits
    kernels = limits.get(tuned.TRITON, limits[pinned])
    assert set(kernels) == launched(), "make aot ARGS=--write"
    assert {target for targets in kernels.values() for target in targets} == set(device.STAND_INS)


def test_every_kernel_compiles_for_every_card_within_its_limits() -> None:
    command = [sys.executable, "-m", "aiollm.kernels.aot", "--limits", str(LIMITS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # as other tests set it; it must not get through
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()[2:]} == launched()
