"""The drawn tokens appended to their rows; the contract is ref/store.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.workload import Case, Shape

BLOCK = 128  # tokens of a program: each is a write of its own


@triton.jit(do_not_specialize=["n"])
def _store(tokens_ptr, rows_ptr, lengths_ptr, drawn_ptr, n, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    trigger(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    row = tl.load(rows_ptr + at, at < n, 0)
    length = tl.load(lengths_ptr + at, at < n, 0)
    drawn = tl.load(drawn_ptr + at, at < n, 0)
    tl.store(tokens_ptr + row * stride + length, tl.maximum(drawn, 0).to(tokens_ptr.dtype.element_ty), at < n)


def store(tokens: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, drawn: torch.Tensor) -> None:
    """tokens [max_rows, max_length] int32, in place; rows, lengths, drawn [r] int64, contiguous."""
    n = len(rows)
    if n:
        _store[(-(-n // BLOCK),)](
            tokens, rows, lengths, drawn, n, tokens.stride(0), BLOCK=BLOCK, num_warps=BLOCK // 32, **pdl(tokens.device)
        )


def cases(shape: Shape) -> Iterator[Case]:
    """A token for each of n of 1,024 rows of 8,192 positions."""
    for n in (1, 256, 1024):

        def make(device: torch.device, n: int = n) -> tuple[torch.Tensor, ...]:
            tokens = torch.randint(1 << 30, (1024, 8192), device=device, dtype=torch.int32)
            lengths = torch.randint(8192, (n,), device=device)
            return tokens, torch.arange(n, device=device), lengths, torch.randint(-1, shape.vocab, (n,), device=device)

        yield Case("store", f"{n} rows", make, bytes=28 * n)
