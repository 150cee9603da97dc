import pytest
import torch

from aiollm.kernels.cases import ROWS
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops

ops_tables = pytest.mark.parametrize(
    "ops", [reference_ops(), cpu_ops(), triton_ops()], ids=["reference", "cpu", "triton"]
)


@ops_tables
@pytest.mark.parametrize("n", ROWS)
def test_each_token_has_the_id_and_slot_of_its_place(ops: Ops, n: int, device: torch.device) -> None:
    tokens = torch.arange(70, dtype=torch.int32, device=device).view(7, 10)
    rows, positions = (torch.arange(n, device=device) * factor % size for factor, size in ((5, 7), (3, 10)))
    ids, slots = ops.inputs(rows, positions, tokens, 1000 - tokens)
    expected = [int(row) * 10 + int(position) for row, position in zip(rows, positions, strict=True)]
    assert (ids.dtype, ids.tolist()) == (torch.int64, expected)
    assert (slots.dtype, slots.tolist()) == (torch.int64, [1000 - at for at in expected])
