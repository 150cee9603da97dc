"""A GPU as the loop uses it: whether it can be used at all, its stream, and graphs of what is launched there."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from aiollm.workers.stream import Pending, StateLost

OLDEST = (8, 0)  # compute capability: bf16 and asynchronous copies, which every kernel uses
SHARED = 99 << 10  # bytes of shared memory that kernels are fitted to at least
OUT_OF_MEMORY = (
    "the GPU ran out of memory in a step: lower --mem_fraction, --batch_max_tokens or --running_max_req_size"
)


def check(device: torch.device) -> None:
    """Raises ValueError with what is wrong and what helps where this device cannot serve."""
    cpu = "--device cpu serves on the CPU"
    if torch.version.cuda is None:
        raise ValueError(f"torch {torch.__version__} was built without CUDA: install another build, or {cpu}")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"CUDA cannot be used: {reason}; torch is for CUDA {torch.version.cuda}, nvidia-smi shows what the driver"
            f" supports; {cpu}"
        ) from error
    index = device.index or 0
    if index >= count:
        raise ValueError(f"{count} GPUs are visible, and GPU {index} is asked for: see --tp and CUDA_VISIBLE_DEVICES")
    found: Any = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    if capability < OLDEST:
        raise ValueError(
            f"{found.name} has compute capability {found.major}.{found.minor}, the kernels need"
            f" {OLDEST[0]}.{OLDEST[1]} or newer; {cpu}"
        )
    if found.shared_memory_per_block_optin < SHARED:
        room = found.shared_memory_per_block_optin >> 10
        raise ValueError(f"{found.name} gives a block {room} KiB of shared memory, the kernels need {SHARED >> 10}")
    if not any(_runs_on(name, capability) for name in torch.cuda.get_arch_list()):
        built = ", ".join(torch.cuda.get_arch_list())
        raise ValueError(f"torch {torch.__version__} was built for {built}, and {found.name} is none of them")


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for `sm_90` or `compute_90` runs: machine code within a major version, PTX on all newer ones."""
    kind, _, number = built.rstrip("af").partition("_")
    if not number.isdigit():
        return False
    major, minor = divmod(int(number), 10)
    return (major, minor) <= capability and (kind == "compute" or major == capability[0])


class CudaStream:
    """One CUDA stream: whoever launches has entered `context`, and launches from the thread that holds the baton."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: CudaPending | None = None

    @contextmanager
    def context(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def launch(self, work: Callable[[], object]) -> Pending:
        pending = CudaPending(self._last)
        pending.launch(work, self._stream)
        self._last = pending
        return pending

    def close(self) -> None:
        self._stream.synchronize()


class CudaPending(Pending):
    """Done when the device has reached the event behind the launch. Times are the device's, on an axis of their own."""

    def __init__(self, before: "CudaPending | None") -> None:
        super().__init__()
        self._before = before
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Who waits sleeps: the loop has another iteration queued, and a spinning thread takes the other one's time.
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def launch(self, work: Callable[[], object], stream: torch.cuda.Stream) -> None:
        """Queue the work; an error here is the launch's own, unless the device is lost with it."""
        try:
            self._begin.record(stream)
            self.result = work()
        except torch.OutOfMemoryError:
            self.error = MemoryError(OUT_OF_MEMORY)
        except BaseException as error:  # noqa: BLE001  the launch's own, read at its post
            self.error = error
        try:
            self._end.record(stream)
        except RuntimeError as error:
            self._lose(error)

    def wait(self) -> None:
        if self._done.is_set():
            return
        try:
            self._end.synchronize()
            if (before := self._before) is not None:
                before.wait()  # the device is past it; whoever waits for it may not have woken yet
                self.began = before.ended + before._end.elapsed_time(self._begin) * 1e-3
            self.ended = self.began + self._begin.elapsed_time(self._end) * 1e-3
        except RuntimeError as error:
            self._lose(error)
        self._before = None
        self._done.set()

    def _lose(self, error: RuntimeError) -> None:
        """A CUDA error that shows up at an event sticks: nothing can be launched any more."""
        reason = str(error).splitlines()[0]
        cause = "" if self.error is None else f"; the step itself failed with {self.error}"
        self.error = StateLost(f"the GPU is lost: {reason}{cause}")
        self._done.set()


class Capture:
    """Captures what is launched on the current stream as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        gc.disable()  # memory that is pinned and let go meanwhile would put an event into the graph
        try:
            # Only this thread must not synchronise meanwhile: the other one may wait for its launch.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the error that matters is that of the work
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            gc.enable()
        replay: Callable[[], Any] = graph.replay
        return replay
