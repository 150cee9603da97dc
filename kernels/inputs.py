"""What a step computes, and where to; the contract is ref/inputs.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.workload import Case, Shape

BLOCK = 128  # tokens of a program: each is two reads that no neighbour shares


@triton.jit(do_not_specialize=["n"])
def _inputs(
    rows_ptr, positions_ptr, tokens_ptr, slots_ptr, id_ptr, slot_ptr, n, token_stride, slot_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    trigger(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    row = tl.load(rows_ptr + at, at < n, 0)
    position = tl.load(positions_ptr + at, at < n, 0)
    token = tl.load(tokens_ptr + row * token_stride + position, at < n)
    slot = tl.load(slots_ptr + row * slot_stride + position, at < n)
    tl.store(id_ptr + at, token.to(tl.int64), at < n)
    tl.store(slot_ptr + at, slot.to(tl.int64), at < n)


def inputs(
    rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, slot_table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows, positions [n] int64, contiguous; tokens, slot_table [max_rows, max_length] int32 -> (ids, slots)."""
    n = len(rows)
    # An even width: where the second row begins, numbers are read 16 bytes at a time for any n.
    ids, slots = torch.empty((2, n + n % 2), dtype=torch.int64, device=rows.device)[:, :n]
    if n:
        _inputs[(-(-n // BLOCK),)](
            rows, positions, tokens, slot_table, ids, slots, n, tokens.stride(0), slot_table.stride(0),
            BLOCK=BLOCK, num_warps=BLOCK // 32, **pdl(rows.device),
        )  # fmt: skip
    return ids, slots


def cases(shape: Shape) -> Iterator[Case]:
    """Tables of 1,024 rows by 8,192 positions."""
    for n in (1, 256, 8192):

        def make(device: torch.device, n: int = n) -> tuple[torch.Tensor, ...]:
            tables = torch.randint(1 << 30, (2, 1024, 8192), device=device, dtype=torch.int32)
            return torch.randint(1024, (n,), device=device), torch.randint(8192, (n,), device=device), *tables.unbind()

        yield Case("inputs", f"{n} tokens", make, bytes=40 * n)
