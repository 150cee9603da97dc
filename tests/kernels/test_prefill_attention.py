"""The reference also computes sequences of one new token, which the kernels leave alone: NaN there."""

from typing import Any, NamedTuple

import pytest
import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import SCORINGS, SEQUENCES, make_batch, make_scoring
from aiollm.kernels.prefill_attention import TILE, Prefill, plan_prefill, prefill_attention
from aiollm.kernels.ref.attention import attention as reference
from aiollm.kernels.tolerance import assert_close
from aiollm.kernels.variants import Scoring

HEADS = [(4, 4, 16), (6, 2, 24), (5, 1, 8)]  # query heads, KV heads, width
WIDTHS = [(8, 2, 64), (6, 2, 80), (5, 1, 96), (32, 8, 128), (4, 2, 256)]
LONG = [(0, 1000), (31068, 1700), (0, 1), (5000, 3), (0, 2), (130, 127), (0, 128), (32767, 1), (0, 129), (1000, 0)]
MANY = [(i * 37 % 190, i % 40) for i in range(200)]
BATCHES = {"long": LONG, "many": MANY, **SEQUENCES}
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch, Scoring]


class Plan(NamedTuple):
    prefill: Prefill


def scoring(name: str, heads: int, width: int) -> Scoring:
    return make_scoring(name, heads, width, window=70)


def inputs(
    name: str, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, how: str = "plain"
) -> Arguments:
    """Arguments of `attention`. Slots whose tokens no new token sees are NaN."""
    hq, hkv, width = heads
    sequences = BATCHES[name]
    slots = max(4096, sum(cached + new for cached, new in sequences))
    batch = make_batch(sequences, slots=slots, max_length=max([1024, *(cached + new for cached, new in sequences)]))
    by = scoring(how, hq, width)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(batch.positions), hq, width, generator=generator).to(device, dtype)
    pools = torch.randn(2, slots + 1, hkv, width, generator=generator)
    seen = torch.zeros(slots + 1, dtype=torch.bool)
    for row, (cached, new) in zip(batch.rows.tolist(), sequences, strict=True):
        first = max(0, cached + 1 - by.window) if by.window else 0
        seen[batch.slot_table[row, first : cached + new].long()] = True
    pools[:, ~seen] = float("nan")
    return q, *pools.to(device, dtype).unbind(), moved(batch, device), moved(by, device)


def moved(value: Any, device: torch.device) -> Any:
    return value._replace(**{k: v.to(device) for k, v in value._asdict().items() if isinstance(v, torch.Tensor)})


def run(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, by: Scoring) -> torch.Tensor:
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    prefill_attention(q, k_pool, v_pool, batch._replace(plan=Plan(plan_prefill(batch))), by, out)
    return out


def expected(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, by: Scoring) -> torch.Tensor:
    """What the reference says of sequences of several new tokens; NaN elsewhere. Keys that no query sees count as 0."""
    out = reference(q, k_pool.nan_to_num(), v_pool.nan_to_num(), batch, by)
    for begin, end in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        if end - begin == 1:
            out[begin] = float("nan")
    return out


def check(arguments: Arguments) -> None:
    actual, wanted = run(*arguments), expected(*arguments)
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert_close(actual.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", [name for name in SEQUENCES if name != "empty"])
def test_it_equals_the_reference(name: str, heads: tuple[int, int, int], device: torch.device) -> None:
    check(inputs(name, heads, torch.float32, device))


@pytest.mark.parametrize("how", SCORINGS)
@pytest.mark.parametrize("name", ["chunk", "mixed"])
def test_it_scores_as_the_reference_does(name: str, how: str, device: torch.device) -> None:
    check(inputs(name, (6, 2, 24), torch.float32, device, how))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("how", ["plain", "all"])
def test_half_precision(how: str, dtype: torch.dtype, device: torch.device) -> None:
    check(inputs("chunk", (6, 2, 64), dtype, device, how))


def test_strided_queries_pools_and_results(device: torch.device) -> None:
    q, k_pool, v_pool, batch, by = inputs("mixed", (4, 2, 64), torch.float16, device)
    wanted = expected(q, k_pool, v_pool, batch, by)
    wide = torch.full((len(q), 9, 64), float("nan"), dtype=q.dtype, device=device)
    wide[:, 1:5] = q
    pools = torch.stack([k_pool, v_pool], 1)  # [slots + 1, 2, hkv, d]
    out = torch.full_like(wide, float("nan"))[:, 2:6]
    planned = batch._replace(plan=Plan(plan_prefill(batch)))
    prefill_attention(wide[:, 1:5], pools[:, 0], pools[:, 1], planned, by, out)
    assert_close(out.nan_to_num(), wanted.nan_to_num())


def test_each_layer_may_use_the_plan(device: torch.device) -> None:
    q, k_pool, v_pool, batch, by = inputs("mixed", (4, 2, 64), torch.float16, device)
    planned = batch._replace(plan=Plan(plan_prefill(batch)))
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    for out in outs:
        prefill_attention(q, k_pool, v_pool, planned, by, out)
    for out in outs:
        assert_close(out.nan_to_num(), expected(q, k_pool, v_pool, batch, by).nan_to_num())


def listed(sequences: list[tuple[int, int]], device: torch.device) -> list[list[int]]:
    batch = moved(make_batch(sequences, slots=1 << 17, max_length=1 << 16), device)
    tiles, counters = plan_prefill(batch)
    count, *rest = counters.tolist()
    assert rest == [0, 0]
    assert count <= len(tiles)
    rows = {row: s for s, row in enumerate(batch.rows.tolist())}
    return [[first, end, rows[row], position] for first, end, row, position in tiles[:count].tolist()]


@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 2)],
        [(5, 1), (7, 300), (0, 0), (1000, 128), (0, 129), (3, 1)],
        [(100, 9000), (0, 8500)],
        [(cached, new) for cached in (0, 640, 7, 5) for new in (1, 500, 2, 129, 0, 128, 64)] * 5,
    ],
    ids=["one", "some", "long", "many"],
)
def test_tiles_that_see_more_keys_come_first(sequences: list[tuple[int, int]], device: torch.device) -> None:
    wanted, begin = [], 0
    for s, (cached, new) in enumerate(sequences):
        if new > 1:
            wanted += [
                (-(cached + min(at + TILE, new)), s, [begin + at, begin + new, s, cached + at])
                for at in range(0, new, TILE)
            ]
        begin += new
    assert listed(sequences, device) == [tile for _, _, tile in sorted(wanted)]


def test_no_sequences(device: torch.device) -> None:
    batch = moved(make_batch([]), device)
    assert len(plan_prefill(batch).tiles) == 0
    check(inputs("empty", (4, 2, 16), torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", WIDTHS, ids=str)
@pytest.mark.parametrize("name", ["long", "many"])
def test_on_a_gpu_long_and_many(name: str, heads: tuple[int, int, int], device: torch.device) -> None:
    check(inputs(name, heads, torch.bfloat16, device))


@pytest.mark.gpu
@pytest.mark.parametrize("how", SCORINGS)
def test_on_a_gpu_all_scorings(how: str, device: torch.device) -> None:
    check(inputs("chunk", (8, 2, 128), torch.bfloat16, device, how))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 2, 256)], ids=str)
def test_on_a_gpu_all_scorings_at_once_at_other_widths(heads: tuple[int, int, int], device: torch.device) -> None:
    check(inputs("chunk", heads, torch.float16, device, "all"))


@pytest.mark.gpu
def test_a_graph_follows_the_lengths(device: torch.device) -> None:
    """Captured with one batch, replayed with others of as many sequences and tokens."""
    heads, by = (8, 2, 128), Scoring(0.1)
    batches = [[(0, 300), (9, 1), (64, 199)], [(77, 1), (0, 498), (900, 1)], [(3, 250), (700, 250), (1, 0)]]
    made = [moved(make_batch(sequences, seed=i), device) for i, sequences in enumerate(batches)]
    q = torch.randn(500, heads[0], heads[2], device=device, dtype=torch.bfloat16)
    pools = torch.randn(2, 4097, heads[1], heads[2], device=device, dtype=torch.bfloat16)
    static = moved(make_batch(batches[0]), device)._replace(max_new=500, max_length=1024)

    def step() -> torch.Tensor:
        return run(q, *pools.unbind(), static, by)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for batch in [*made, made[0]]:
        for name in ("rows", "starts", "lengths", "positions", "slots", "slot_table"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        wanted = expected(q, *pools.unbind(), batch, by)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert_close(out.nan_to_num(), wanted.nan_to_num())
