import pytest
import torch

from aiollm.kernels import device as devices
from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import SEQUENCES, make_batch, make_scoring, on
from aiollm.kernels.cpu import attention as cpu
from aiollm.kernels.ops import Ops, cpu_ops, reference_ops, triton_ops
from aiollm.kernels.ref.attention import attention as reference
from aiollm.kernels.tolerance import assert_close
from aiollm.kernels.variants import Norm, Scoring

HEADS = [(4, 4, 16), (6, 2, 24), (5, 1, 8)]  # query heads, KV heads, width
SLOPES, SINKS = torch.tensor([0.5, 0.25, 0.125, 0.06, 0.03, 0.01]), torch.tensor([0.0, 3.0, -2.0, 1.0, -30.0, 9.0])
SCORINGS = {
    "plain": Scoring(0.3),
    "window": Scoring(0.3, window=40),
    "window of one": Scoring(0.3, window=1),
    "softcap": Scoring(0.3, softcap=1.5),
    "ALiBi": Scoring(0.3, slopes=SLOPES),
    "sinks": Scoring(0.3, sinks=SINKS),
    "all": Scoring(0.3, 40, 2.0, SLOPES, SINKS),
}


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
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, batch: Batch, scoring: Scoring
) -> torch.Tensor:
    """Token by token and head by head in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // k_pool.shape[1]
    for s in range(len(batch.rows)):
        for token in range(int(batch.starts[s]), int(batch.starts[s + 1])):
            last = int(batch.positions[token])
            first = max(last + 1 - scoring.window, 0) if scoring.window else 0
            slots = batch.slot_table[batch.rows[s], first : last + 1].long()
            for head in range(q.shape[1]):
                keys, values = k_pool[slots, head // group].double(), v_pool[slots, head // group].double()
                scores = keys @ q[token, head].double() * scoring.scale
                if scoring.softcap:
                    scores = scoring.softcap * (scores / scoring.softcap).tanh()
                if scoring.slopes is not None:
                    scores += scoring.slopes[head] * (torch.arange(first, last + 1) - last)
                sink = 0.0 if scoring.sinks is None else scoring.sinks[head].double().exp()
                out[token, head] = scores.exp() @ values / (scores.exp().sum() + sink)
    return out


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_reference_equals_attention_one_head_at_a_time(name: str, scoring: str) -> None:
    batch = make_batch(SEQUENCES[name])
    arguments = (*inputs(batch, (6, 2, 24)), batch, SCORINGS[scoring])
    assert_close(reference(*arguments), one_head_at_a_time(*arguments).float())


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_cpu_equals_reference(name: str, heads: tuple[int, int, int]) -> None:
    batch = make_batch(SEQUENCES[name])
    arguments = (*inputs(batch, heads), batch, Scoring(heads[2] ** -0.5))
    assert_close(cpu.attention(*arguments), reference(*arguments))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", ["decode", "prefill", "mixed", "no_new"])
def test_cpu_scores_as_the_reference_does(name: str, scoring: str) -> None:
    batch = make_batch(SEQUENCES[name])
    arguments = (*inputs(batch, (6, 2, 24)), batch, SCORINGS[scoring])
    assert_close(cpu.attention(*arguments), reference(*arguments))


@pytest.mark.parametrize("window", [1, 7, 40])
@pytest.mark.parametrize("name", SEQUENCES)
def test_cpu_reads_nothing_that_lies_before_the_window(name: str, window: int) -> None:
    batch, scoring = make_batch(SEQUENCES[name]), Scoring(0.2, window=window)
    q, k_pool, v_pool = inputs(batch, (6, 2, 24))
    expected = reference(q, k_pool, v_pool, batch, scoring)
    counts = batch.starts.diff().tolist()
    for row, length, new in zip(batch.rows.tolist(), batch.lengths.tolist(), counts, strict=True):
        before = batch.slot_table[row, : max(0, length - max(new, 1) + 1 - window)].long()
        k_pool[before], v_pool[before] = float("nan"), float("nan")
    assert_close(cpu.attention(q, k_pool, v_pool, batch, scoring), expected)
    assert_close(cpu.attention(q, k_pool, v_pool, cpu_ops().plan(batch, 2), scoring), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scoring", ["plain", "all"])
def test_cpu_equals_reference_in_half_precision(scoring: str, dtype: torch.dtype) -> None:
    batch = make_batch(SEQUENCES["mixed"])
    arguments = (*inputs(batch, (6, 2, 24), dtype), batch, SCORINGS[scoring])
    assert_close(cpu.attention(*arguments), reference(*arguments))


@pytest.mark.parametrize("ops", [reference_ops(), cpu_ops()], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_planned_batch_gives_the_same(name: str, ops: Ops) -> None:
    batch = make_batch(SEQUENCES[name])
    q, k_pool, v_pool = inputs(batch, (6, 2, 24))
    expected = reference(q, k_pool, v_pool, batch, Scoring(0.2))
    assert_close(ops.attention(q, k_pool, v_pool, ops.plan(batch, 2), Scoring(0.2)), expected)


def test_cpu_splits_a_large_decode_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.kernels.cpu.plan.GATHERED", 2 * 3 * 65)  # room for three short rows together
    batch = cpu_ops().plan(make_batch(SEQUENCES["decode"]), 2)
    assert [len(group.tokens) for group in batch.plan.decodes] == [1, 3, 1]
    arguments = (*inputs(batch, (6, 2, 24)), batch, Scoring(0.2))
    assert_close(cpu.attention(*arguments), reference(*arguments))


def test_a_query_of_a_strided_view_is_read_right() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    q, k_pool, v_pool = inputs(batch, (4, 2, 16))
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)
    expected = reference(q, k_pool, v_pool, batch, Scoring(0.25))
    assert_close(cpu.attention(wide[:, :4], k_pool, v_pool, batch, Scoring(0.25)), expected)


@pytest.mark.parametrize("scoring", ["plain", "all"])
@pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
@pytest.mark.parametrize("name", ["empty", "decode", "mixed", "no_new"])
def test_triton_computes_one_token_and_longer_sequences(
    name: str, planned: bool, scoring: str, device: torch.device
) -> None:
    batch, ops, by = make_batch(SEQUENCES[name]), triton_ops(), SCORINGS[scoring]
    tensors = inputs(batch, (6, 2, 24))
    expected = reference(*tensors, batch, by)
    there = Batch(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in batch))
    by = Scoring(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in by))
    with devices.standing_in(devices.H100._replace(multiprocessors=2)):  # few programs for the interpreter
        actual = ops.attention(*(x.to(device) for x in tensors), ops.plan(there, 2) if planned else there, by)
    assert_close(actual.cpu(), expected)


MANY = [(i * 37 % 400, 1) for i in range(300)]
PROMPTS = [(0, 200), (3, 77), (0, 1), (900, 300)]
BESIDE = {
    **{name: SEQUENCES[name] for name in ("prefill", "chunk", "mixed", "no_new")},
    "many": MANY + PROMPTS,
    "long prompt": [(5, 1), (4000, 1500), (20000, 1)],
    "long context": [(15000, 1), (30000, 1), (0, 130)],
}


def real(
    sequences: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
    """Arguments on the device, in heads of a real model; contexts of up to `room` tokens."""
    slots = sum(cached + new for cached, new in sequences) + 64
    batch = make_batch(sequences, slots=slots, max_length=room)
    q, k_pool, v_pool = (x.to(device) for x in inputs(batch, heads, dtype, slots))
    return q, k_pool, v_pool, on(device, batch)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["plain", "window", "softcap", "ALiBi", "sinks"])
@pytest.mark.parametrize("heads", [(32, 8, 128), (28, 4, 128), (8, 8, 64), (16, 8, 256)], ids=str)
@pytest.mark.parametrize("name", BESIDE)
def test_prompts_beside_one_token_sequences_equal_the_reference(
    name: str, heads: tuple[int, int, int], how: str, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = real(BESIDE[name], heads, dtype, device, 1 << 15)
    (by,) = on(device, make_scoring(how, heads[0], heads[2], window=40))
    assert_close(triton_ops().attention(*arguments, by), reference(*arguments, by))


@pytest.mark.gpu
def test_kernels_side_by_side_are_done_when_the_next_one_begins(device: torch.device) -> None:
    """A graph of layers with and without a window, whatever its prompts and contexts are. The norm behind each reads
    what both kernels wrote, and is launched while they run."""
    heads, ops = (32, 8, 128), triton_ops()
    plain, windowed = Scoring(128**-0.5), Scoring(128**-0.5, window=100)
    weight = Norm(torch.ones(heads[0] * heads[2], device=device, dtype=torch.bfloat16), 1e-6)
    room, slots = 1 << 15, 1 << 17
    pools = torch.zeros(2, slots, *heads[1:], device=device, dtype=torch.bfloat16)
    q, _, _, static = real(BESIDE["many"], heads, torch.bfloat16, device, room)

    def layers(q: torch.Tensor, step: Batch) -> torch.Tensor:
        step = ops.plan(step, heads[1])
        for by in (plain, windowed, plain, windowed):
            y = ops.attention(q, *pools.unbind(), step, by)
            q = ops.norm(y.flatten(1), weight).view(q.shape)
        return q

    layers(q, static)
    captured, graph = q.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layers(captured, static)
    for sequences in (BESIDE["many"], MANY, PROMPTS, [(20000, 1), (300, 500), (30000, 1)], BESIDE["many"]):
        fresh, k_pool, v_pool, step = real(sequences, heads, torch.bfloat16, device, room)
        used, count = len(fresh), len(sequences)
        pools[0, : len(k_pool)], pools[1, : len(v_pool)] = k_pool, v_pool
        captured[:used] = fresh
        static.starts.fill_(used)
        static.lengths.zero_()
        static.starts[: count + 1], static.lengths[:count], static.rows[:count] = step.starts, step.lengths, step.rows
        static.slot_table[: len(step.slot_table)] = step.slot_table
        first = ops.attention(captured, *pools.unbind(), static._replace(plan=None), plain)[:used]
        assert_close(first, reference(fresh, k_pool, v_pool, step, plain))
        expected = layers(captured.clone(), static)[:used].clone()
        for _ in range(50):
            graph.replay()
            assert torch.equal(result[:used], expected)
