"""The reference also computes sequences of several new tokens, which the kernel leaves alone: NaN there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aiollm.kernels import device as devices
from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import SCORINGS, SEQUENCES, make_batch, make_scoring
from aiollm.kernels.decode_attention import Tile, decode_attention, fit, lay_out
from aiollm.kernels.plan import Plan
from aiollm.kernels.ref.attention import attention as reference
from aiollm.kernels.tolerance import assert_close
from aiollm.kernels.variants import Scoring

QWEN = (32, 8, 128)  # query heads, KV heads, width
HEADS = [(4, 4, 16), (6, 2, 24), (5, 1, 8), (8, 8, 64), (17, 1, 16), (6, 6, 80), (4, 2, 96)]
LONG = [(0, 1), (32767, 1), (1, 1), (5000, 1), (63, 1), (17, 3), (12000, 1), (300, 1), (0, 5), (99, 1)]
THOUSAND = [(i * 37 % 190, 1) for i in range(1000)]
BATCHES = {"long": LONG, "thousand": THOUSAND, **SEQUENCES}
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch, Scoring]


@pytest.fixture(autouse=True)
def few_multiprocessors() -> Iterator[None]:
    """In the interpreter two stand for 132: it runs all programs, one by one; and more sequences are cut."""
    with devices.standing_in(devices.H100._replace(multiprocessors=2)):
        yield


def scoring(name: str, heads: int, width: int) -> Scoring:
    return make_scoring(name, heads, width, window=40)


def inputs(
    name: str, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, how: str = "plain"
) -> Arguments:
    """Arguments of `attention`. Slots that no sequence of the batch owns are NaN."""
    hq, hkv, width = heads
    sequences = BATCHES[name]
    slots = max(4096, sum(cached + new for cached, new in sequences))
    batch = make_batch(sequences, slots=slots, max_length=max([1024, *(cached + new for cached, new in sequences)]))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(batch.positions), hq, width, generator=generator).to(device, dtype)
    pools = torch.randn(2, slots + 1, hkv, width, generator=generator)
    pools[:, ~owned(batch, slots)] = float("nan")
    return q, *pools.to(device, dtype).unbind(), moved(batch, device), moved(scoring(how, hq, width), device)


def owned(batch: Batch, slots: int, window: int = 0) -> torch.Tensor:
    """[slots + 1] bool: whether a sequence has the slot, within the last `window` positions if that is not 0."""
    found = torch.zeros(slots + 1, dtype=torch.bool)
    for row, length in zip(batch.rows.tolist(), batch.lengths.tolist(), strict=True):
        found[batch.slot_table[row, max(0, length - window) if window else 0 : length].long()] = True
    return found


def moved(value: Any, device: torch.device) -> Any:
    return value._replace(**{k: v.to(device) for k, v in value._asdict().items() if isinstance(v, torch.Tensor)})


def run(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, by: Scoring, beside: bool = False
) -> torch.Tensor:
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    batch = batch if batch.plan else batch._replace(plan=Plan(None, {}))
    decode_attention(q, k_pool, v_pool, batch, by, out, lay_out(q, k_pool, batch, by, beside))
    return out


def check(*arguments: Any) -> None:
    """Compare where a sequence brings one token; elsewhere nothing is written."""
    out, expected, starts = run(*arguments), reference(*arguments), arguments[3].starts.long()
    ours = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    ours[starts[:-1][starts.diff() == 1]] = True
    assert_close(out[ours], expected[ours])
    assert out[~ours].isnan().all()


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_it_equals_the_reference(name: str, heads: tuple[int, int, int], device: torch.device) -> None:
    check(*inputs(name, heads, torch.float32, device))


@pytest.mark.parametrize("name", [name for name in SEQUENCES if name != "empty"])
def test_it_equals_the_reference_on_any_batch(name: str, device: torch.device) -> None:
    check(*inputs(name, (6, 2, 24), torch.float32, device))


@pytest.mark.parametrize("how", SCORINGS)
def test_it_scores_as_the_reference_does(how: str, device: torch.device) -> None:
    check(*inputs("mixed", (6, 2, 24), torch.float32, device, how))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("how", ["plain", "all"])
def test_it_equals_the_reference_in_half_precision(how: str, dtype: torch.dtype, device: torch.device) -> None:
    check(*inputs("decode", (8, 4, 64), dtype, device, how))


@pytest.mark.parametrize("multiprocessors", [1, 3, 20])
def test_it_matters_little_where_sequences_are_cut(multiprocessors: int, device: torch.device) -> None:
    with devices.standing_in(devices.H100._replace(multiprocessors=multiprocessors)):
        check(*inputs("decode", (4, 2, 16), torch.float32, device, "sinks"))


@pytest.mark.parametrize("multiprocessors", [1, 4, 9])
def test_fewer_workers_compute_the_same_beside_prompts(multiprocessors: int, device: torch.device) -> None:
    with devices.standing_in(devices.H100._replace(multiprocessors=multiprocessors)):
        arguments = inputs("mixed", (4, 2, 16), torch.float32, device, "window")
        ours = arguments[3].starts[:-1][arguments[3].starts.diff() == 1].long()
        assert_close(run(*arguments, beside=True)[ours], reference(*arguments)[ours])


def test_a_second_run_gives_the_same_bits(device: torch.device) -> None:
    """What a plan counts is set back by the run that counted it."""
    q, k_pool, v_pool, batch, by = inputs("decode", (4, 2, 16), torch.float32, device)
    batch = batch._replace(plan=Plan(None, {}))
    first = run(q, k_pool, v_pool, batch, by)
    (laid,) = batch.plan.decode.values()
    assert not laid.arrived.any()
    assert torch.equal(run(q, k_pool, v_pool, batch, by), first)


def test_layers_with_and_without_a_window_each_have_a_plan(device: torch.device) -> None:
    q, k_pool, v_pool, batch, _ = inputs("decode", (4, 2, 16), torch.float32, device)
    batch = batch._replace(plan=Plan(None, {}))
    for by in (Scoring(0.25), Scoring(0.25, window=40), Scoring(0.25)):
        check(q, k_pool, v_pool, batch, by)
    assert sorted(layout.window for layout in batch.plan.decode) == [0, 40]


def test_nothing_is_read_outside_the_window(device: torch.device) -> None:
    q, k_pool, v_pool, batch, by = inputs("decode", (4, 2, 16), torch.float32, device, "window")
    expected = run(q, k_pool, v_pool, batch, by)
    unseen = ~owned(moved(batch, torch.device("cpu")), len(k_pool) - 1, by.window).to(device)
    k_pool[unseen], v_pool[unseen] = float("nan"), float("nan")
    assert torch.equal(run(q, k_pool, v_pool, batch, by), expected)


def test_views_of_wider_tensors_are_read_right(device: torch.device) -> None:
    q, k_pool, v_pool, batch, by = inputs("mixed", (4, 2, 16), torch.float32, device)
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)[:, :4]
    pools = torch.cat([k_pool, v_pool], dim=1)
    check(wide, pools[:, :2], pools[:, 2:], batch, by)


def test_a_tile_is_cut_to_what_fits() -> None:
    wished, h100, l40s = (64, 8, 2, 3), devices.H100.shared_memory, devices.L40S.shared_memory
    assert fit(*wished, kv_heads=8, group=4, width=128, size=2, room=h100) == Tile(8, 8, 4, 128, 3, 2)
    assert fit(*wished, kv_heads=12, group=1, width=128, size=2, room=h100) == Tile(4, 16, 4, 128, 3, 2)
    assert fit(*wished, kv_heads=8, group=16, width=96, size=2, room=h100) == Tile(2, 32, 16, 128, 3, 2)
    assert fit(*wished, kv_heads=1, group=71, width=64, size=2, room=h100) == Tile(1, 64, 128, 64, 3, 2)
    assert fit(*wished, kv_heads=8, group=1, width=256, size=2, room=h100) == Tile(8, 8, 2, 256, 3, 1)
    assert fit(*wished, kv_heads=8, group=4, width=256, size=4, room=l40s) == Tile(8, 2, 4, 256, 2, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["long", "thousand"])
def test_long_and_many_sequences(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(*inputs(name, QWEN, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["plain", "all"])
@pytest.mark.parametrize("heads", [QWEN, (8, 8, 64), (28, 4, 80), (12, 2, 96), (16, 4, 192), (16, 1, 256), (71, 1, 64)])
def test_heads_of_real_models(heads: tuple[int, int, int], how: str, dtype: torch.dtype, device: torch.device) -> None:
    check(*inputs("decode", heads, dtype, device, how))


@pytest.mark.gpu
def test_a_graph_serves_other_lengths_and_rows(device: torch.device) -> None:
    q, k_pool, v_pool, batch, by = inputs("decode", QWEN, torch.bfloat16, device)
    static = batch._replace(rows=batch.rows.clone(), lengths=batch.lengths.clone())

    def layers() -> list[torch.Tensor]:
        planned = static._replace(plan=Plan(None, {}))
        return [run(q, k_pool, v_pool, planned, by._replace(window=window)) for window in (0, 100, 0)]

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layers()
    for order in ([4, 3, 2, 1, 0], [0, 4, 1, 3, 2], [4, 4, 4, 4, 4]):
        static.rows.copy_(batch.rows[order])
        static.lengths.copy_(batch.lengths[order])
        graph.replay()
        for out, window in zip(outs, (0, 100, 0), strict=True):
            assert_close(out, reference(q, k_pool, v_pool, static, by._replace(window=window)))
