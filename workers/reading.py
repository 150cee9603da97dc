"""Parts of files, read by threads straight to where they belong: in host memory, or through pinned memory on a GPU.

A GPU's thread has two pinned buffers: while one is copied to the device on a stream of the thread's own, the next part
is read into the other. A CPU's thread reads where the numbers stay, or into a buffer where they change on the way.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from aiollm.workers.checkpoint import CheckpointError

PART_BYTES = 16 << 20  # read at a time: large enough for full bandwidth, small beside any model
READERS = 8  # threads for a GPU; for a CPU as many as compute, at most these


class Part(NamedTuple):
    """Neighbouring rows of a tensor on disk, and where they go."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]  # of these rows with all their columns
    dtype: torch.dtype  # on disk
    columns: tuple[slice, ...]  # that are taken
    owner: str  # the parameter that it is a part of
    target: Callable[[], torch.Tensor]  # of the shape that is taken and any dtype; called when the part's turn comes

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read(parts: Sequence[Part], device: torch.device, landed: Callable[[Part], None]) -> None:
    """Read all `parts`, about in order, into their targets on `device`, and call `landed` as each one is there.

    Both callables are called by the threads. Raises what they raise, and CheckpointError where a file ends too early.
    """
    if not parts:
        return
    on_gpu = device.type == "cuda"
    readers = min(READERS, len(parts), READERS if on_gpu else torch.get_num_threads())
    waiting = iter(list(parts))  # threads may share a list's iterator
    with ExitStack() as stack:
        files = {path: os.open(path, os.O_RDONLY) for path in {part.path for part in parts}}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        size = max(part.nbytes for part in parts)

        def reader() -> None:
            try:
                (_onto_gpu if on_gpu else _into_host)(waiting, files, size, device, landed)
            finally:
                for _ in waiting:  # after an error the other threads find nothing more to do
                    pass

        pool = stack.enter_context(ThreadPoolExecutor(readers, "reader"))
        for future in [pool.submit(reader) for _ in range(readers)]:
            future.result()


def _into_host(
    parts: Iterator[Part],
    files: Mapping[Path, int],
    size: int,
    device: torch.device,
    landed: Callable[[Part], None],
) -> None:
    buffer: torch.Tensor | None = None
    for part in parts:
        target = part.target()
        if target.dtype == part.dtype and target.shape == part.shape:
            _fill(target.reshape(-1).view(torch.uint8), part, files)
        else:
            buffer = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer
            target.copy_(_rows(buffer, part, files)[(slice(None), *part.columns)])
        landed(part)


def _onto_gpu(
    parts: Iterator[Part],
    files: Mapping[Path, int],
    size: int,
    device: torch.device,
    landed: Callable[[Part], None],
) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        default = torch.cuda.default_stream()
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copying: list[tuple[torch.cuda.Event, Part]] = []

        def land() -> None:
            event, part = copying.pop(0)
            event.synchronize()
            landed(part)

        for count, part in enumerate(parts):
            if len(copying) == len(buffers):
                land()
            rows = _rows(buffers[count % len(buffers)], part, files)
            target = part.target()
            stream.wait_stream(default)  # which may still be writing zeros there
            with torch.cuda.stream(stream):
                if target.dtype != part.dtype or target.shape != rows.shape:
                    # The host would need a second buffer to cut columns or change numbers; the device is faster at it.
                    rows = rows.to(device, non_blocking=True)[(slice(None), *part.columns)]
                target.copy_(rows, non_blocking=True)
                copying.append((stream.record_event(), part))
        while copying:
            land()
        default.synchronize()  # for what `landed` has launched there


def _rows(buffer: torch.Tensor, part: Part, files: Mapping[Path, int]) -> torch.Tensor:
    """The part as it is on disk, read into `buffer`."""
    raw = buffer[: part.nbytes]
    _fill(raw, part, files)
    return raw.view(part.dtype).view(part.shape)


def _fill(raw: torch.Tensor, part: Part, files: Mapping[Path, int]) -> None:
    """Read the part's bytes into `raw`, uint8 of that length."""
    view = memoryview(raw.numpy().data)
    done = 0
    while done < part.nbytes:
        count = os.preadv(files[part.path], [view[done:]], part.offset + done)
        if count == 0:
            raise CheckpointError(f"{part.path} became shorter while it was read")
        done += count
