"""What a kernel's host function may want to know of the device: asked for at the first call, never at import.

Tensors that lie on no GPU (the interpreter, ahead-of-time compilation) get the facts of a stand-in, an H100 unless
`standing_in` names another, so that host functions run the same everywhere.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    name: str  # as the driver says it
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that one block may ask for


A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10)
L40S = Device("NVIDIA L40S", (8, 9), 142, 99 << 10)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10)
B200 = Device("NVIDIA B200", (10, 0), 148, 227 << 10)
STAND_INS = {"sm_80": A100, "sm_89": L40S, "sm_90": H100, "sm_100": B200}

_stand_in: contextvars.ContextVar[Device | None] = contextvars.ContextVar("stand_in", default=None)


def facts(device: torch.device) -> Device:
    """The facts of a CUDA device, or those of the stand-in."""
    return _queried(device) if device.type == "cuda" else _stand_in.get() or H100


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side if each fills one multiprocessor."""
    return facts(device).multiprocessors


def capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) is sm_90."""
    return facts(device).capability


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may ask for."""
    return facts(device).shared_memory


def name(device: torch.device) -> str:
    """The device as a folder's name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", facts(device).name.lower()).strip("-")


def current() -> torch.device:
    """The device that a kernel launched now would run on; the CPU where there is no GPU, or another one stands in."""
    here = _stand_in.get() is None and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu")


@contextlib.contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Within, tensors that lie on no GPU get the facts of `device`, and what was tuned for it is looked up."""
    token = _stand_in.set(device)
    try:
        yield
    finally:
        _stand_in.reset(token)


@functools.cache
def _queried(device: torch.device) -> Device:
    found: Any = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    return Device(found.name, capability, found.multi_processor_count, found.shared_memory_per_block_optin)
