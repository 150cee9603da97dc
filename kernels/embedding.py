"""Rows of the token table; the contract is ref/embedding.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from aiollm.kernels.pdl import pdl, trigger, wait
from aiollm.kernels.tuned import Key, lookup
from aiollm.kernels.workload import Case, Shape

CANDIDATES = [{"BLOCK": b} for b in (512, 1024, 2048, 4096)]
THREAD = 8  # elements for a thread: one 16-byte load


@triton.jit
def _embedding(ids_ptr, table_ptr, y_ptr, stride, H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    wait(PDL)
    token = tl.load(ids_ptr + row)
    tl.store(y_ptr + row * H + columns, tl.load(table_ptr + token * stride + columns, inside), inside)


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [n] int64, contiguous; table [vocab, h], its rows contiguous -> [n, h] in the table's dtype."""
    n, h = len(ids), table.shape[1]
    y = torch.empty((n, h), dtype=table.dtype, device=table.device)
    if n:
        key: Key = {"rows": 1 << (n - 1).bit_length(), "width": h, "dtype": str(table.dtype)}
        block = lookup("embedding", key, {"BLOCK": 1024})["BLOCK"]
        _embedding[(n, -(-h // block))](
            ids, table, y, table.stride(0), H=h, BLOCK=block, num_warps=block // (32 * THREAD), **pdl(table.device)
        )
    return y


def cases(shape: Shape) -> Iterator[Case]:
    """Random tokens at decode and prefill sizes."""
    for n in (1, 256, 4096):

        def make(device: torch.device, n: int = n) -> tuple[torch.Tensor, torch.Tensor]:
            table = torch.empty(shape.vocab, shape.hidden, device=device, dtype=shape.dtype).normal_()
            return torch.randint(shape.vocab, (n,), device=device), table

        yield Case("embedding", f"{n} tokens", make, bytes=2 * n * shape.hidden * shape.dtype.itemsize)
