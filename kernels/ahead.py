"""Compile what would be launched, and launch nothing.

Host functions run on "meta" tensors, with a driver that only names a target: Triton specialises and compiles each
launch as it would on that GPU. What it compiles lies in its cache, where a process that launches the same finds it.
"""

import contextlib
from collections.abc import Iterable, Iterator
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
    was compiled: hash -> (kernel, compiled kernel). With `jobs` so many threads compile; the end waits for them, and
    fills the dict then. Raises what a compilation raises.
    """
    compiled: dict[str, tuple[Any, Any]] = {}
    coming: dict[int, tuple[Any, Any]] = {}
    run: Any = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if compiling:
            result = run(self, *arguments, grid=grid, warmup=True, **options)
            if jobs:
                coming[id(result)] = self, result
            else:
                compiled.setdefault(result.hash, (self, result))

    JITFunction.run = compile_only
    driver = triton.runtime.driver
    before, driver._active = driver._active, _Driver(facts.capability)  # reset_active() asks for a device
    tuned.forget()  # what was found for another device
    try:
        with device.standing_in(facts), _threads(jobs):
            yield compiled
        for kernel, result in coming.values():
            done = result.result() if hasattr(result, "result") else result  # a later launch finds it finished
            compiled.setdefault(done.hash, (kernel, done))
    finally:
        JITFunction.run = run
        driver._active = before
        tuned.forget()


def link(compiled: Iterable[Any], jobs: int) -> None:
    """Build what launches compiled kernels on this process's GPU: Triton 3.6 does it in C and takes 0.4 s for each."""
    launcher = triton.runtime.driver.active.launcher_cls
    unlike = {str((kernel.src.signature, kernel.src.constants)): kernel for kernel in compiled}
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda kernel: launcher(kernel.src, kernel.metadata), unlike.values()))


@contextlib.contextmanager
def _threads(jobs: int) -> Iterator[None]:
    if not jobs:
        yield
        return
    with ThreadPoolExecutor(jobs) as pool, triton.AsyncCompileMode(pool):
        yield
