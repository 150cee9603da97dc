import torch

from aiollm.kernels.batch import Batch
from aiollm.kernels.ops import reference_ops
from aiollm.workers.windows import Windows, ring

CPU = torch.device("cpu")


def lay(windows: Windows, row: int, positions: range, first: int) -> None:
    """Slots that count on from `first`, and 1,000 further for each further group."""
    groups = len(windows.tables)
    values = [first + 1000 * group + at for group in range(groups) for at in range(len(positions))]
    rows = torch.full((len(positions),), row)
    windows.lay(rows, torch.tensor(positions), torch.tensor(values, dtype=torch.int32))


def batch_of(sequences: list[tuple[int, int, int]]) -> tuple[Batch, torch.Tensor]:
    """Sequences (row, length, new), and the rows of their tokens."""
    counts = torch.tensor([0, *(new for _, _, new in sequences)])
    rows = torch.tensor([row for row, _, _ in sequences])
    positions = torch.cat([torch.arange(length - new, length) for _, length, new in sequences])
    lengths = torch.tensor([length for _, length, _ in sequences], dtype=torch.int32)
    nothing = torch.zeros(len(positions), dtype=torch.int64)
    most, longest = int(counts.max()), int(lengths.max())
    batch = Batch(rows, counts.cumsum(0).int(), lengths, positions, nothing, torch.zeros(1, 1).int(), most, longest)
    return batch, rows.repeat_interleave(counts[1:])


def test_a_row_keeps_its_last_positions_one_behind_the_other() -> None:
    windows = Windows(2, 4, 2, 8, CPU)
    windows.pad_into(99)
    lay(windows, 0, range(6), 10)
    lay(windows, 0, range(6, 11), 16)
    assert windows.tables[:, 0].tolist() == [
        [18, 19, 20, 13, 14, 15, 16, 17], [1018, 1019, 1020, 1013, 1014, 1015, 1016, 1017],
    ]  # fmt: skip
    assert not windows.tables[:, 1].any() and (windows.tables[:, 2] == 99).all()


def test_of_a_run_that_is_longer_the_end_counts() -> None:
    windows = Windows(1, 4, 3, 8, CPU)
    windows.pad_into(99)
    rows, positions = torch.tensor([1] * 20 + [0] * 3), torch.cat([torch.arange(20), torch.arange(3)])
    windows.lay(rows, positions, torch.arange(23, dtype=torch.int32))
    assert windows.tables[0].tolist() == [
        [20, 21, 22, 0, 0, 0, 0, 0], [16, 17, 18, 19, 12, 13, 14, 15], [0] * 8, [99] * 8,
    ]  # fmt: skip


def test_every_sequence_begins_where_its_window_does() -> None:
    windows = Windows(2, 4, 2, 12, CPU)
    lay(windows, 0, range(10), 100)
    lay(windows, 0, range(10, 17), 110)
    lay(windows, 1, range(2), 200)
    batch, token_rows = batch_of([(0, 16, 1), (1, 2, 2), (0, 17, 3), (1, 0, 0)])
    first, second = windows.batches(batch, token_rows, reference_ops())
    assert first.lengths.tolist() == second.lengths.tolist() == [4, 2, 6, 0]
    table = first.slot_table[first.rows]
    assert table[0, :4].tolist() == [112, 113, 114, 115]
    assert table[1, :2].tolist() == [200, 201]
    assert table[2, :6].tolist() == [111, 112, 113, 114, 115, 116]
    assert first.slots.tolist() == [115, 200, 201, 114, 115, 116]
    assert second.slots.tolist() == [slot + 1000 for slot in first.slots.tolist()]
    assert first.positions is batch.positions and first.starts is batch.starts


def test_models_without_windows_have_none() -> None:
    windows = Windows(0, 0, 2, 1, CPU)
    windows.pad_into(7)
    windows.lay(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.empty(0, dtype=torch.int32))
    batch, token_rows = batch_of([(0, 2, 2)])
    assert windows.batches(batch, token_rows, reference_ops()) == () and windows.tables.nbytes == 0


def test_a_ring_holds_what_is_seen_and_what_is_granted() -> None:
    assert ring(4096, 2048) == 4096 + 2048 + 16 and ring(10, 1) == 80
