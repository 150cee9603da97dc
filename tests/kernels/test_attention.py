import pytest
import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import SEQUENCES, make_batch
from aiollm.kernels.cpu import attention as cpu
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops
from aiollm.kernels.ref.attention import attention as reference
from aiollm.kernels.tolerance import assert_close

HEADS = [(4, 4, 16), (6, 2, 24), (5, 1, 8)]  # query heads, KV heads, width


def inputs(
    batch: Batch, heads: tuple[int, int, int], dtype: torch.dtype = torch.float32, slots: int = 4096
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and pools; every slot that no sequence of the batch owns is NaN."""
    generator = torch.Generator().manual_seed(1)
    hq, hkv, width = heads
    q = torch.randn(len(batch.positions), hq, width, generator=generator).to(dtype)
    pools = torch.randn(2, slots + 1, hkv, width, generator=generator).to(dtype)
    owned = torch.zeros(slots + 1, dtype=torch.bool)
    for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
        owned[batch.slot_table[row, :length].long()] = True
    pools[:, ~owned] = float("nan")
    return q, pools[0], pools[1]


def one_head_at_a_time(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scale: float
) -> torch.Tensor:
    """Token by token and head by head in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // k_pool.shape[1]
    for s in range(len(batch.rows)):
        for token in range(int(batch.starts[s]), int(batch.starts[s + 1])):
            slots = batch.slot_table[batch.rows[s], : batch.positions[token] + 1].long()
            for head in range(q.shape[1]):
                keys, values = k_pool[slots, head // group].double(), v_pool[slots, head // group].double()
                out[token, head] = (keys @ q[token, head].double() * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("name", SEQUENCES)
def test_reference_equals_attention_one_head_at_a_time(name: str) -> None:
    batch = make_batch(SEQUENCES[name])
    q, k_pool, v_pool = inputs(batch, (6, 2, 24))
    expected = one_head_at_a_time(q, k_pool, v_pool, batch, 0.3).float()
    assert_close(reference(q, k_pool, v_pool, batch, 0.3), expected)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_cpu_equals_reference(name: str, heads: tuple[int, int, int]) -> None:
    batch = make_batch(SEQUENCES[name])
    arguments = (*inputs(batch, heads), batch, heads[2] ** -0.5)
    assert_close(cpu.attention(*arguments), reference(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_equals_reference_in_half_precision(dtype: torch.dtype) -> None:
    batch = make_batch(SEQUENCES["mixed"])
    arguments = (*inputs(batch, (6, 2, 24), dtype), batch, 0.2)
    assert_close(cpu.attention(*arguments), reference(*arguments))


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_planned_batch_gives_the_same(name: str, ops: Ops) -> None:
    batch = make_batch(SEQUENCES[name])
    q, k_pool, v_pool = inputs(batch, (6, 2, 24))
    assert_close(ops.attention(q, k_pool, v_pool, ops.plan(batch, 2), 0.2), reference(q, k_pool, v_pool, batch, 0.2))


def test_cpu_splits_a_large_decode_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.kernels.cpu.plan.GATHERED", 2 * 3 * 65)  # room for three short rows together
    batch = cpu_ops().plan(make_batch(SEQUENCES["decode"]), 2)
    assert [len(group.tokens) for group in batch.plan.decodes] == [1, 3, 1]
    arguments = (*inputs(batch, (6, 2, 24)), batch, 0.2)
    assert_close(cpu.attention(*arguments), reference(*arguments))


def test_a_query_of_a_strided_view_is_read_right() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    q, k_pool, v_pool = inputs(batch, (4, 2, 16))
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)
    assert_close(cpu.attention(wide[:, :4], k_pool, v_pool, batch, 0.25), reference(q, k_pool, v_pool, batch, 0.25))
