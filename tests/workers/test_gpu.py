"""What a GPU must be is tried on properties that are made up; streams and graphs only where there is a GPU."""

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aiollm.workers import gpu
from aiollm.workers.stream import StateLost

HERE = torch.device("cuda")


def pretend(patch: pytest.MonkeyPatch, count: int = 1, **others: Any) -> None:
    """A machine with GPUs like an H100, but for what `others` says."""
    found = {"name": "Some GPU", "major": 9, "minor": 0, "shared_memory_per_block_optin": 227 << 10} | others
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "init", lambda: None)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**found))
    patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"])


def test_a_gpu_like_those_the_kernels_were_written_for_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    gpu.check(HERE)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"major": 7, "minor": 5}, r"Some GPU has compute capability 7\.5, the kernels need 8\.0 or newer"),
        ({"shared_memory_per_block_optin": 64 << 10}, r"gives a block 64 KiB of shared memory, the kernels need 99"),
        ({"major": 11, "minor": 0}, r"was built for sm_80, sm_90, sm_100, sm_120, compute_120, and Some GPU is none"),
        ({"count": 0}, r"0 GPUs are visible, and GPU 0 is asked for: see --tp and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_line(
    facts: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **facts)
    with pytest.raises(ValueError, match=said):
        gpu.check(HERE)


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"was built without CUDA: install another build, or --device cpu serves"):
        gpu.check(HERE)


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore text")

    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(ValueError, match=r"too old \(found version 11040\)\.; torch is for CUDA 13\.0, nvidia-smi"):
        gpu.check(HERE)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_90", (9, 0), True), ("sm_90a", (9, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False),
        ("sm_90", (8, 9), False), ("compute_90", (12, 0), True), ("compute_120", (9, 0), False),
        ("gfx90a", (9, 0), False),
    ],
)  # fmt: skip
def test_machine_code_runs_within_its_major_version(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert gpu._runs_on(built, capability) is runs


@pytest.mark.gpu
def test_launches_come_in_order_with_the_devices_own_times() -> None:
    stream = gpu.CudaStream(HERE)
    with stream.context():
        x = torch.randn(2048, 2048, device=HERE)
        pendings = [stream.launch(lambda: (x @ x).to("cpu", non_blocking=True)) for _ in range(5)]
    pendings[-1].wait()
    for pending in pendings[:-1]:
        pending.wait()
    assert all(p.done and p.error is None and p.ended > p.began for p in pendings)
    assert all(a.ended <= b.began for a, b in itertools.pairwise(pendings))
    torch.testing.assert_close(pendings[2].result, (x @ x).cpu())


@pytest.mark.gpu
def test_an_error_of_a_launch_is_its_own_and_memory_that_lacks_names_the_flags() -> None:
    stream = gpu.CudaStream(HERE)
    with stream.context():
        failed, full = stream.launch(lambda: 1 // 0), stream.launch(lambda: torch.empty(1 << 50, device=HERE))
        fine = stream.launch(lambda: torch.ones(3, device=HERE).sum().to("cpu", non_blocking=True))
    for pending in (failed, full, fine):
        pending.wait()
    assert isinstance(failed.error, ZeroDivisionError)
    assert isinstance(full.error, MemoryError) and "--mem_fraction" in str(full.error)
    assert fine.error is None and fine.result == 3


@pytest.mark.gpu
def test_a_captured_graph_reads_what_lies_there_now_and_shares_its_memory_with_others() -> None:
    stream, capture = gpu.CudaStream(HERE), gpu.Capture()
    with stream.context():
        x, y = torch.ones(64, device=HERE), torch.zeros(64, device=HERE)
        replays = [capture(lambda factor=factor: y.copy_(x * factor)) for factor in (2, 3)]  # type: ignore[misc]
        x.fill_(5)
        replays[1]()
        assert y.sum().item() == 64 * 15
        replays[0]()
        assert y.sum().item() == 64 * 10


@pytest.mark.gpu
def test_a_lost_device_is_told_from_a_failed_step() -> None:
    """A failed assertion on the device sticks: run in a process of its own, which cannot use the GPU afterwards."""
    code = """
import torch
from aiollm.workers import gpu
stream = gpu.CudaStream(torch.device("cuda"))
with stream.context():
    table = torch.zeros(4, device="cuda")
    pending = stream.launch(lambda: torch._assert_async(table[0]))
    pending.wait()
    again = stream.launch(lambda: table + 1)
    again.wait()
print(type(pending.error).__name__, type(again.error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [StateLost.__name__] * 2, done.stderr
