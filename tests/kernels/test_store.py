import pytest
import torch

from aiollm.kernels.cases import ROWS
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops

ops_tables = pytest.mark.parametrize(
    "ops", [reference_ops(), cpu_ops(), triton_ops()], ids=["reference", "cpu", "triton"]
)


@ops_tables
@pytest.mark.parametrize("n", ROWS)
def test_a_drawn_token_lies_after_its_row_and_minus_one_becomes_0(ops: Ops, n: int, device: torch.device) -> None:
    tokens = torch.full((101, 6), 5, dtype=torch.int32)
    rows, lengths = torch.arange(n).flip(0), torch.arange(n) % 6
    drawn = torch.arange(n) * 3 - 1
    expected = tokens.clone()
    for row, length, token in zip(rows.tolist(), lengths.tolist(), drawn.tolist(), strict=True):
        expected[row, length] = max(token, 0)
    given = tokens.to(device)
    ops.store(given, rows.to(device), lengths.to(device), drawn.to(device))
    assert torch.equal(given.cpu(), expected)
