"""Compile what would be launched, and launch nothing.

Host functions run on "meta" tensors, with a driver that only names a target: Triton specialises and compiles each
launch as it would on that GPU. What it compiles lies in its cache, where a process that launches the same finds it.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from aiollm.kernels import device, tuned

META = torch.device("meta")


class _Driver:
    """Stands in for Triton's driver: names the target, has no device."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.arch = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, _: int) -> int:
        return 0


@contextlib.contextmanager
def launches(facts: device.Device, compiling: bool = True, jobs: int = 0) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Within, a launch does not run; it compiles for the device, or does nothing at all.

    Tensors must be on "meta", and nobody else in this process may launch meanwhile. Yields a dict that fills with what
    was compiled: hash -> (kernel, compiled kernel). With `jobs` so many threads compile, the dict stays empty, and the
    end waits for them. Raises what a compilation raises.
    """
    compiled: dict[str, tuple[Any, Any]] = {}
    run: Any = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if compiling:
            result = run(self, *arguments, grid=grid, warmup=True, **options)
            if not jobs:
                compiled.setdefault(result.hash, (self, result))

    JITFunction.run = compile_only
    driver = triton.runtime.driver
    before, driver._active = driver._active, _Driver(facts.capability)  # reset_active() asks for a device
    tuned.forget()  # what was found for another device
    try:
        with device.standing_in(facts), _threads(jobs):
            yield compiled
    finally:
        JITFunction.run = run
        driver._active = before
        tuned.forget()


@contextlib.contextmanager
def _threads(jobs: int) -> Iterator[None]:
    if not jobs:
        yield
        return
    with ThreadPoolExecutor(jobs) as pool, triton.AsyncCompileMode(pool):
        yield
