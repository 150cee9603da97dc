import pytest
import torch

from aiollm.kernels.cases import ROWS, normal
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops

ops_tables = pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
rows = pytest.mark.parametrize("n", ROWS)


@ops_tables
@rows
def test_embedding_takes_the_rows(ops: Ops, n: int) -> None:
    table = normal(11, 6)
    ids = torch.arange(n) * 7 % 11
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[0], *(table[i] for i in ids)])[1:])
