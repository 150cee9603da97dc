import resource
from pathlib import Path

import pytest
import torch

from aiollm.workers.groups import Groups
from aiollm.workers.kv import (
    CPU_MOST,
    LEAST_SLOTS,
    MOST_SLOTS,
    ROUNDING,
    allocate,
    available_memory,
    bytes_per_slot,
    fewer,
    fitting,
    least,
    most,
    obtainable_memory,
)
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard

CPU = torch.device("cpu")
SPEC = DecoderSpec(
    layers=3, hidden=8, heads=8, kv_heads=4, head_dim=16, intermediate=16, vocab=10, max_position=64, norm_eps=1e-6,
    rope=Rope(16, 1e4), tied_head=False,
)  # fmt: skip


def machine(root: Path, available_kib: int, **files: str) -> Path:
    """A root folder whose files say how much memory there is; `files` are those of a control group."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {available_kib} kB\nHugePages_Total: 0\n"
    )
    version_1 = "limit_in_bytes" in "".join(files)
    group = root / "sys/fs/cgroup" / ("memory" if version_1 else "")
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(text)
    return root


def test_layers_of_several_groups_share_pools_and_cost_what_those_take() -> None:
    groups = Groups(8, 2, ((1, 0), (0, 0), (0, 1)))
    assert bytes_per_slot(SPEC, Shard(SPEC, 0, 1), torch.float32, groups) == 2 * 2 * 4 * 16 * 4
    first, second, third = allocate(5, SPEC, Shard(SPEC, 0, 1), torch.float32, CPU, groups)
    assert first[0] is second[0] and first[1] is second[1] and third[0] is not first[0]
    assert first[0].shape == (6, 4, 16)


def test_without_a_control_group_the_machine_says_what_is_available(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, 1000)) == 1000 << 10


def test_a_group_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, 1000, memory__max="max\n", memory__current="99\n", memory__stat="inactive_file 5\n")
    assert available_memory(root) == 1000 << 10


@pytest.mark.parametrize(
    ("files"),
    [
        {"memory__max": "500000\n", "memory__current": "400000\n", "memory__stat": "anon 1\ninactive_file 50000\n"},
        {
            "memory__limit_in_bytes": "500000\n",
            "memory__usage_in_bytes": "400000\n",
            "memory__stat": "inactive_file 1\ntotal_inactive_file 50000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_groups_limit_counts_and_its_inactive_file_cache_is_free(tmp_path: Path, files: dict[str, str]) -> None:
    assert available_memory(machine(tmp_path, 1000, **files)) == 150_000


def test_all_of_the_file_cache_can_be_had_and_swap_on_request(tmp_path: Path) -> None:
    """A model that was read twice lies in the active part."""
    stat = "inactive_file 50000\nactive_file 300000\nanon 1\n"
    root = machine(tmp_path, 1000, memory__max="500000\n", memory__current="400000\n", memory__stat=stat)
    assert (available_memory(root), obtainable_memory(root)) == (150_000, 450_000)
    with (root / "proc/meminfo").open("a") as file:
        file.write("SwapFree:  7 kB\n")
    assert (obtainable_memory(root), obtainable_memory(root, swap=True)) == (450_000, 450_000 + (7 << 10))


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(tmp_path, 1000, memory__max="500\n", memory__current="600\n", memory__stat="")
    assert available_memory(root) == 0


def test_this_machine_has_memory() -> None:
    assert available_memory() > 1 << 20


def test_a_slot_holds_keys_and_values_of_all_layers() -> None:
    assert bytes_per_slot(SPEC, Shard(SPEC, 0, 1), torch.bfloat16) == 2 * 3 * 4 * 16 * 2
    assert bytes_per_slot(SPEC, Shard(SPEC, 1, 2), torch.float32) == 2 * 3 * 2 * 16 * 4


def test_slots_take_what_memory_allows_and_no_more_than_a_laptop_can_spare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiollm.workers.kv.available_memory", lambda: 1_000_000)
    assert fitting(100, CPU, 0.5) == 5000
    monkeypatch.setattr("aiollm.workers.kv.available_memory", lambda: 1 << 50)
    assert fitting(1 << 20, CPU, 0.9) == CPU_MOST >> 20


def test_too_little_memory_names_the_flag_with_the_value_that_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.workers.kv.available_memory", lambda: 100 << 20)
    left = r"50 MiB are left for the KV cache.* 1048576 bytes: "
    with pytest.raises(MemoryError, match=left + r"raise --mem_fraction to 0\.64, free memory"):
        fitting(1 << 20, CPU, 0.5)
    assert fitting(1 << 20, CPU, 0.64) == 64
    monkeypatch.setattr("aiollm.workers.kv.available_memory", lambda: 60 << 20)
    with pytest.raises(MemoryError, match=r"1048576 bytes: free memory, or choose a smaller model"):
        fitting(1 << 20, CPU, 0.9)


def test_a_gpu_names_the_fraction_that_would_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
    with pytest.raises(MemoryError, match=r"0 MiB are left .*raise --mem_fraction to 0\.80, "):
        fitting(1 << 20, gpu, 0.7, 3 << 30)
    assert fitting(1 << 20, gpu, 0.8, 3 << 30) > 64


def test_what_may_be_asked_for_is_all_memory_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what a laptop can spare; ranks share it."""
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda swap: (1 << 40) + swap * (1 << 30))
    assert most(1 << 20, CPU, 0.5) == 1 << 19
    assert most(1 << 20, CPU, 0.5, ranks=4) == 1 << 17
    assert most(1 << 20, CPU, 1.0, reserved=1 << 38, ranks=2) == 1 << 18, "each rank has weights of its own"
    assert most(1 << 20, CPU, 1.0, swap=True) == (1 << 20) + (1 << 10)
    assert most(1 << 20, CPU, 1.0, reserved=1 << 41) == 0


def test_a_gpu_grants_what_it_would_take_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total, reserved, gpu = 60 << 30, 80 << 30, 3 << 30, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    assert most(1 << 20, gpu, 0.9, reserved) == fitting(1 << 20, gpu, 0.9, reserved)
    assert most(1 << 20, gpu, 0.9, 70 << 30) == 0


def test_slots_have_numbers_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    gpu = torch.device("cuda", 0)
    assert most(1, gpu, 1.0) == fitting(1, gpu, 1.0) == MOST_SLOTS == 2**31 - 1


def test_pools_have_one_slot_more_for_padding_and_this_ranks_heads() -> None:
    pools = allocate(10, SPEC, Shard(SPEC, 0, 2), torch.bfloat16, CPU)
    assert len(pools) == 3
    assert {(tensor.shape, tensor.dtype) for pair in pools for tensor in pair} == {((11, 2, 16), torch.bfloat16)}
    assert len({tensor.data_ptr() for pair in pools for tensor in pair}) == 6


def test_the_pages_of_a_pool_are_not_touched_before_they_are_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    pools = allocate(1 << 18, SPEC, Shard(SPEC, 0, 1), torch.float32, CPU)
    assert sum(tensor.nbytes for pair in pools for tensor in pair) > 300 << 20
    assert resident() - before < 40 << 20
    assert not any(tensor[::5000].any() for pair in pools for tensor in pair)


def test_a_cache_needs_its_tokens_and_on_a_gpu_what_is_lost_by_rounding() -> None:
    assert least(5, 100, CPU) == 500 and least(0, 100, CPU) == LEAST_SLOTS * 100
    assert least(5, 100, torch.device("cuda", 0)) == 500 + ROUNDING


def test_a_pool_that_does_not_fit_is_told_with_the_size_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.workers.kv.obtainable_memory", lambda: 1 << 30)
    per_slot = 2 * 3 * 4 * 16 * 4
    said = rf"takes {(2**50 + 1) * per_slot / 2**30:.2f} GiB, .* \(1\.00 GiB were free\): "
    with pytest.raises(MemoryError, match=rf"{said}--max_total_token_num {2**30 // per_slot - 1} would fit"):
        allocate(1 << 50, SPEC, Shard(SPEC, 0, 1), torch.float32, CPU)


def failing(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> None:
    """Pools lie on the device "meta", and after so many tensors there is none."""
    made: list[torch.Tensor] = []

    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if len(made) == after:
            raise error
        made.append(torch.zeros(shape, dtype=dtype, device="meta"))
        return made[-1]

    monkeypatch.setattr("aiollm.workers.kv._zeros", zeros)


@pytest.mark.parametrize(("after", "left", "fits"), [(4, 0, 666), (4, 1 << 40, 666), (0, 1 << 30, 0), (0, -1, 9)])
def test_a_gpu_that_gives_less_than_is_free_is_told_with_the_size_that_it_gave(
    monkeypatch: pytest.MonkeyPatch, after: int, left: int, fits: int
) -> None:
    """What another process took meanwhile, or a limit that no figure shows: six pools of 1,001 slots were wanted."""
    per_slot = 2 * 3 * 4 * 16 * 2
    free = left if left >= 0 else 10 * per_slot
    failing(monkeypatch, after, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (ROUNDING + free, 80 << 30))
    value = f"--max_total_token_num {fits} would fit" if fits else "lower --max_total_token_num"
    with pytest.raises(MemoryError, match=rf"a KV cache of 1000 tokens takes 0\.7 MiB, .* were free\): {value};"):
        allocate(1000, SPEC, Shard(SPEC, 0, 1), torch.bfloat16, torch.device("cuda", 0))


def test_the_size_that_would_fit_counts_a_slot_for_each_group_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(8, 2, ((1, 0), (0, 0), (0, 1)))
    failing(monkeypatch, 2, MemoryError())
    with pytest.raises(MemoryError, match=r"a KV cache of 500 tokens takes .*--max_total_token_num 249 would"):
        allocate(1000, SPEC, Shard(SPEC, 0, 1), torch.float32, CPU, groups)


def test_other_errors_of_an_allocation_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        allocate(10, SPEC, Shard(SPEC, 0, 1), torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("each", "free", "given", "fits"),
    [
        (1, 1001, 0, 99), (1, 800, 900, 79), (1, 900, 800, 79), (2, 900, 800, 39), (1, 2000, 0, 0), (1, 9999, 2000, 0),
        (1, 19, 0, 0), (1, -5, 100, 0),
    ],
)  # fmt: skip
def test_fewer_tokens_fit_into_what_is_free_and_no_more_than_was_given(
    each: int, free: int, given: int, fits: int
) -> None:
    assert fewer(100, 10, each, free, given) == fits


def test_a_gpu_keeps_what_is_reserved_and_the_share_that_nobody_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total, reserved = 60 << 30, 80 << 30, 3 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    room = free - int(total * 0.1) - reserved - ROUNDING
    assert fitting(1 << 20, torch.device("cuda", 0), 0.9, reserved) == room >> 20
