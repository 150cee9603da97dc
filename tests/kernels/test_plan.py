import math

import pytest
import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.cases import SEQUENCES, make_batch
from aiollm.kernels.cpu import plan as cpu
from aiollm.kernels.plan import Decode, Layout, plan, plan_decode
from aiollm.kernels.ref.plan import plan as reference


def test_the_reference_plans_nothing() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    assert reference(batch, 2) is batch


def test_one_token_sequences_are_laid_out_together_and_longer_ones_alone() -> None:
    batch = make_batch(SEQUENCES["mixed"])
    prefills, decodes, _ = cpu.plan(batch, 3).plan
    assert [(begin, end, len(slots)) for begin, end, slots in prefills] == [(1, 34, 33), (35, 42, 71), (43, 45, 2)]
    assert sorted(token for group in decodes for token in group.tokens.tolist()) == [0, 34, 42]


def test_each_kv_head_of_a_decode_finds_its_keys() -> None:
    batch = make_batch([(6, 1), (9, 1)])
    ((tokens, lengths, places, hidden),) = cpu.plan(batch, 2).plan.decodes
    assert (tokens.tolist(), lengths.tolist()) == ([0, 1], [7, 10])
    of_row, padded = places.view(2, 2, 10), hidden.view(2, 2, 10)
    for i, length in enumerate((7, 10)):
        slots = batch.slot_table[batch.rows[i], :length]
        for head in range(2):
            assert of_row[i, head, :length].tolist() == (2 * slots + head).tolist()
            assert padded[i, head].isneginf().tolist() == [at >= length for at in range(10)]
    assert set(of_row[0, 1, 7:].tolist()) == {int(of_row[0, 1, 0])}  # padding reads what the row owns


def test_short_sequences_are_not_padded_to_a_long_one() -> None:
    groups = list(cpu._groups([(n, 0, 0) for n in (1000, 10, 501, 9, 600, 4)], room=1700))
    assert [[length for length, _, _ in group] for group in groups] == [[1000], [501, 600], [9, 10], [4]]


def lay_out(batch: Batch, layout: Layout, device: torch.device) -> Decode:
    return plan_decode(moved(batch, device), layout)


def moved(batch: Batch, device: torch.device) -> Batch:
    values = batch._asdict().items()
    return Batch(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in values})


def test_other_slots_of_the_same_sequences_share_a_plan_on_gpus_and_have_their_own_on_cpus(
    device: torch.device,
) -> None:
    batch = make_batch(SEQUENCES["mixed"])
    table = batch.slot_table.flip(0)
    planned = plan(moved(batch, device), 3)
    assert plan(planned._replace(slot_table=table.to(device)), 3).plan is planned.plan
    again = cpu.plan(cpu.plan(batch, 3)._replace(slot_table=table), 3).plan
    alone = cpu.plan(batch._replace(slot_table=table), 3).plan
    assert [group.places.tolist() for group in again.decodes] == [group.places.tolist() for group in alone.decodes]


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("workers", [1, 5, 40])
@pytest.mark.parametrize("name", ["first_token", "decode", "prefill", "mixed", "no_new"])
def test_the_workers_share_all_tiles_of_one_token_sequences(
    name: str, workers: int, window: int, device: torch.device
) -> None:
    batch = make_batch(SEQUENCES[name])
    laid = lay_out(batch, Layout(window, 16, workers, 2, 3, 8), device)
    wanted = [
        (row, length, token)
        for row, length, token, new in zip(
            batch.rows.tolist(),
            batch.lengths.tolist(),
            batch.starts.tolist(),
            batch.starts.diff().tolist(),
            strict=False,
        )
        if new == 1
    ]
    tiles = [-(-(min(length, window) if window else length) // 16) for _, length, _ in wanted]
    ends = torch.tensor(tiles).cumsum(0).tolist()
    assert laid.entries[:, : len(wanted)].T.tolist() == [[end, *entry] for end, entry in zip(ends, wanted, strict=True)]
    assert not laid.arrived.any()
    per = max(-(-sum(tiles) // workers), min(max(tiles), 128 // 16))
    whole = -(-per // max(tiles)) * max(tiles)
    per = whole if whole * 8 <= per * 9 else per
    for worker, record in enumerate(laid.workers.tolist()):
        assert record[:2] == [per, sum(tiles)]
        if worker * per < sum(tiles):
            entry = next(i for i, end in enumerate(ends) if worker * per < end)
            assert record[2:] == [entry, ends[entry] - tiles[entry], ends[entry], *wanted[entry]]


def test_sequences_of_one_length_are_not_cut_for_a_few_idle_workers(device: torch.device) -> None:
    batch = make_batch([(79, 1)] * 30, slots=2400)
    laid = lay_out(batch, Layout(0, 16, 16, 1, 3, 8), device)
    assert laid.workers[:, :3].tolist() == [[10, 150, min(2 * worker, 30) % 30] for worker in range(16)]


def test_more_sequences_than_a_program_reads_at_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    batch = make_batch([(i * 37 % 190, i % 3) for i in range(40)])
    layout = Layout(0, 16, 7, 1, 3, 8)
    expected = lay_out(batch, layout, device)
    monkeypatch.setattr("aiollm.kernels.plan.SEQUENCES", 8)
    ours = lay_out(batch, layout, device)
    count = int((batch.starts.diff() == 1).sum())
    assert torch.equal(ours.workers, expected.workers)
    assert torch.equal(ours.entries[:, :count], expected.entries[:, :count])


def test_a_step_of_one_token_each_has_no_prefill_to_lay_out(device: torch.device) -> None:
    assert plan(moved(make_batch(SEQUENCES["decode"]), device), 2).plan.prefill is None
    mixed = plan(moved(make_batch(SEQUENCES["mixed"]), device), 2).plan
    assert mixed.prefill is not None
    assert mixed.decode == {}


H100 = 132


@pytest.mark.parametrize(
    ("sequences", "workers"),
    {
        "decode alone": ([(1000, 1)] * 8, 33),
        "prompts alone": ([(0, 300), (40, 2)], 33),
        # 8 blocks of queries by (4 + 1) of keys, 500 tokens each, beside 63 tiles of 16 tokens for each of 50
        "both": ([(999, 1)] * 50 + [(0, 1000)], 33 * (H100 - math.ceil(H100 * 20000 / (20000 + 50 * 1008))) // H100),
        "too little to read for one worker": ([(15, 1), (0, 1000)], 33),
    }.values(),
    ids=str,
)
def test_multiprocessors_are_shared_out_as_the_work_is(
    sequences: list[tuple[int, int]], workers: int, device: torch.device
) -> None:
    """33 workers, of four head blocks each, are what 132 multiprocessors hold."""
    batch = make_batch(sequences, slots=60000, max_length=1024)
    laid = lay_out(batch, Layout(0, 16, 33, 4, 3, 8, H100, 500), device)
    prompts = any(new > 1 for _, new in sequences)
    assert laid.prompts.tolist() == [H100 - 4 * workers if workers < 33 else H100 * prompts]
    tiles = [-(-(cached + 1) // 16) for cached, new in sequences if new == 1]
    per, total = laid.workers[0, :2].tolist()
    assert total == sum(tiles)
    assert per in (max(-(-total // workers), min([8, *tiles])), max([1, *tiles]))


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("prompt", [2, 100, 700, 3000])
def test_what_is_too_little_for_one_more_worker_goes_back_to_prompts(
    heads: int, prompt: int, device: torch.device
) -> None:
    batch = make_batch([(999, 1)] * 40 + [(0, prompt)], slots=60000, max_length=4096)
    count = H100 // heads
    laid = lay_out(batch, Layout(0, 16, count, heads, 3, 8, H100, 500), device)
    left = H100 - laid.prompts.item()
    per, total = laid.workers[0, :2].tolist()
    used = -(-total // per)
    if left:
        assert used <= count * left // H100
        assert left == -(-(count * left // H100) * H100 // count)


def test_a_long_sequence_alone_is_not_cut_into_crumbs(device: torch.device) -> None:
    batch = make_batch([(999, 1), (20, 1)], slots=1100, max_length=1024)
    laid = lay_out(batch, Layout(0, 16, 132, 1, 3, 8), device)
    assert laid.workers[0, :2].tolist() == [8, 65], "128 tokens, where 132 workers could have 16 each"


def test_a_window_shortens_what_prompts_take(device: torch.device) -> None:
    batch = make_batch([(999, 1)] * 50 + [(8000, 1000)], slots=60000, max_length=9000)
    shares = [
        lay_out(batch, Layout(window, 16, H100, 1, 3, 8, H100, 50), device).prompts.item() for window in (0, 1000)
    ]
    assert shares == [  # of 50 sequences 63 tiles are read, with a window of 1,000 as well
        math.ceil(H100 * blocks * 50 / (blocks * 50 + 50 * 1008)) for blocks in (8 * (67 + 1), 8 * (8 + 1))
    ]
