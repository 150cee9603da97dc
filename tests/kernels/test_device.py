import subprocess
import sys

import pytest
import torch

from aiollm.kernels import device

CPU = torch.device("cpu")


def test_a_tensor_on_no_gpu_gets_the_facts_of_an_h100() -> None:
    assert device.multiprocessors(CPU) == 132
    assert device.capability(torch.device("meta")) == (9, 0)
    assert device.shared_memory(CPU) == 227 * 1024


def test_another_card_can_stand_in_for_a_while() -> None:
    with device.standing_in(device.L40S):
        assert device.capability(CPU) == (8, 9)
        with device.standing_in(device.B200):
            assert device.multiprocessors(CPU) == 148
        assert device.shared_memory(CPU) == 99 * 1024
    assert device.capability(CPU) == (9, 0)


def test_what_is_compiled_for_another_card_takes_nothing_that_was_tuned_for_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device.current() == torch.device("cuda", 0)
    with device.standing_in(device.L40S):
        assert device.name(device.current()) == "nvidia-l40s"


def test_a_name_is_fit_for_a_folder() -> None:
    assert device.name(CPU) == "nvidia-h100-80gb-hbm3"
    with device.standing_in(device.H100._replace(name="GeForce RTX 4090 (Laptop)")):
        assert device.name(CPU) == "geforce-rtx-4090-laptop"


def test_a_stand_in_carries_its_capabilitys_name() -> None:
    for name, facts in device.STAND_INS.items():
        assert name == f"sm_{facts.capability[0]}{facts.capability[1]}"


def test_importing_asks_no_device() -> None:
    code = """
import torch
def refuse(*_): raise AssertionError("a device was asked for")
for name in ("is_available", "current_device", "get_device_properties", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import aiollm.kernels.device, aiollm.kernels.tuned, aiollm.kernels.aot, aiollm.kernels.autotune, aiollm.kernels.bench
from aiollm.kernels.workload import modules
modules()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_a_gpu_is_asked_for_its_facts() -> None:
    facts = device.facts(device.current())
    assert facts.name == torch.cuda.get_device_name()
    assert facts.capability == torch.cuda.get_device_capability()
    assert facts.shared_memory >= 48 << 10
