import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.embedding import embedding
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
rows = pytest.mark.parametrize("n", ROWS)


@ops_tables
@rows
def test_embedding_takes_the_rows(ops: Ops, n: int) -> None:
    table = normal(11, 6)
    ids = torch.arange(n) * 7 % 11
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[0], *(table[i] for i in ids)])[1:])


@rows
@pytest.mark.parametrize("width", [6, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_takes_the_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    table = normal(11, width, dtype=dtype).to(device)
    ids = (torch.arange(n) * 7 % 11).to(device)
    assert torch.equal(embedding(ids, table), table[ids])
