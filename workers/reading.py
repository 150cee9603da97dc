"""Parts of files, read by threads straight to where they belong: in host memory, or through pinned memory on a GPU.

A GPU's thread has two pinned buffers: while one is copied to the device on a stream of the thread's own, the next piece
is read into the other. A CPU's thread reads where the numbers stay, or into a buffer where they change on the way.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

from aiollm.workers.checkpoint import CheckpointError

PART_BYTES = 16 << 20  # read at a time: large enough for full bandwidth, small beside any model
# As it is stored, on the way to a GPU, where each part costs its thread some 12 calls of torch: 16.4 GB in parts of 16,
# 32, 64 and 128 MB took 0.59, 0.50, 0.45 and 0.39 s. What has to be changed there lies there twice meanwhile.
WHOLE_BYTES = 128 << 20
PIECE_BYTES = 4 << 20  # on its way to a GPU: the pinned buffers of all threads together stay in the host's cache
READERS = 12  # threads for a GPU; for a CPU as many as compute, at most these


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
                if on_gpu:
                    _onto_gpu(waiting, files, device, landed)
                else:
                    _into_host(waiting, files, size, landed)
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
    landed: Callable[[Part], None],
) -> None:
    buffer = torch.empty(size, dtype=torch.uint8)  # takes no memory before it is written
    for part in parts:
        target = part.target()
        as_stored = target.dtype == part.dtype and target.shape == part.shape
        raw = target.view(-1).view(torch.uint8) if as_stored else buffer[: part.nbytes]
        _fill(memoryview(raw.numpy().data), part, 0, files)
        if not as_stored:
            target.copy_(raw.view(part.dtype).view(part.shape)[(slice(None), *part.columns)])
        landed(part)


def _onto_gpu(
    parts: Iterator[Part],
    files: Mapping[Path, int],
    device: torch.device,
    landed: Callable[[Part], None],
) -> None:
    """One thread's work. Each call of torch lets the GIL go and has to wait for it again, which with a dozen threads
    takes longer than most of them do: so there are few for each part, and one for each piece."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    default = torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        pieces = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        slots = cycle([(piece, memoryview(piece.numpy().data)) for piece in pieces])
        copied: Part | None = None  # the part whose last piece is on its way

        def finish() -> None:
            nonlocal copied
            stream.synchronize()
            if copied is not None:
                with torch.cuda.stream(default):
                    landed(copied)
                copied = None

        for part in parts:
            with torch.cuda.stream(default):
                target = part.target()
            as_stored = target.dtype == part.dtype and target.shape == part.shape
            # Columns are cut and numbers changed on the device, which is faster at it than the host.
            whole = target if as_stored else torch.empty(part.shape, dtype=part.dtype, device=device)
            begin = 0
            for into in torch.split(whole.view(-1).view(torch.uint8), PIECE_BYTES) if part.nbytes else ():
                piece, view = next(slots)
                size = min(PIECE_BYTES, part.nbytes - begin)
                if size < PIECE_BYTES:
                    piece, view = piece[:size], view[:size]
                _fill(view, part, begin, files)
                finish()  # the piece before: the next one takes its buffer
                if begin == 0:
                    stream.wait_stream(default)  # which may still be writing zeros there
                into.copy_(piece, non_blocking=True)
                begin += size
            if not as_stored:
                target.copy_(whole[(slice(None), *part.columns)])
            if not part.nbytes:
                finish()
            copied = part
        finish()
        default.synchronize()  # for what `landed` has launched there


def _fill(view: memoryview, part: Part, begin: int, files: Mapping[Path, int]) -> None:
    """Read the part's bytes from its byte `begin` into all of `view`."""
    done = 0
    while done < len(view):
        count = os.preadv(files[part.path], [view[done:]], part.offset + begin + done)
        if count == 0:
            raise CheckpointError(f"{part.path} became shorter while it was read")
        done += count
