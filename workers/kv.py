"""The KV pools: how many slots fit, and the tensors they live in. A token has one slot for each group of layers; one
slot more takes padding."""

import math
from pathlib import Path

import numpy as np
import torch

from aiollm.workers import fit
from aiollm.workers.groups import Groups, one
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard

CGROUPS = (  # versions 2 and 1: folder, limit, usage, and the parts of it that are inactive and active file cache
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file", "active_file"),
    (
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        "total_inactive_file", "total_active_file",
    ),
)  # fmt: skip
ROUNDING = 256 << 20  # bytes: each layer's pools end within a page of 2 MiB, and each thread's cuBLAS takes 32 MiB
LEAST_SLOTS = 64
MOST_SLOTS = 2**31 - 1  # tables hold their numbers as int32, that of the slot for padding too
CPU_MOST = 4 << 30  # bytes of KV on a CPU unless --max_total_token_num says otherwise: a laptop has other work too


def bytes_per_slot(spec: DecoderSpec, shard: Shard, dtype: torch.dtype, groups: Groups | None = None) -> int:
    """Keys and values of one token in the layers of a group, which without groups are all layers, on this rank."""
    return 2 * (groups or one(spec)).pools * shard.kv_heads * spec.head_dim * dtype.itemsize


def fitting(per_slot: int, device: torch.device, fraction: float, reserved: int = 0) -> int:
    """Slots that fit into the memory that is free now, of which `fraction` may be used; on a GPU without `reserved`
    bytes, which other things still need."""
    if device.type == "cuda":
        free, total = _gpu_memory(device, reserved)
        room = free - int(total * (1 - fraction))
    else:
        free = total = available_memory()
        room = min(CPU_MOST, int(total * fraction))
    slots = room // per_slot
    if slots < LEAST_SLOTS:
        enough = fit.least_fraction(LEAST_SLOTS * per_slot, free, total)
        helps = f"raise --mem_fraction to {enough}, " if enough else ""
        raise MemoryError(
            f"{max(0, room) >> 20} MiB are left for the KV cache, and one token takes {per_slot} bytes:"
            f" {helps}free memory, or choose a smaller model"
        )
    return min(slots, MOST_SLOTS)


def most(
    per_slot: int, device: torch.device, fraction: float, reserved: int = 0, ranks: int = 1, swap: bool = False
) -> int:
    """Slots that may be asked for: as many as fit beside the `reserved` bytes of each rank, on a CPU up to all memory
    that there is, which the ranks share, with `swap` also what can be swapped out."""
    if device.type == "cuda":
        free, total = _gpu_memory(device, reserved)
        room = free - int(total * (1 - fraction))
    else:
        room = int((obtainable_memory(swap=swap) - ranks * reserved) * fraction) // ranks
    return min(max(0, room // per_slot), MOST_SLOTS)


def least(tokens: int, per_token: int, device: torch.device) -> int:
    """Bytes without which there is no KV cache of so many tokens; 0 tokens are the least that is taken unasked."""
    return (tokens or LEAST_SLOTS) * per_token + (ROUNDING if device.type == "cuda" else 0)


def _gpu_memory(device: torch.device, reserved: int) -> tuple[int, int]:
    """Bytes that pools may take at most, and all that the GPU has."""
    free, total = torch.cuda.mem_get_info(device)
    return free - reserved - ROUNDING, total


def obtainable_memory(root: Path = Path("/"), swap: bool = False) -> int:
    """Bytes of host memory that can be had at all: what `available_memory` says, the rest of the file cache too, which
    the system gives up last, and on request what can be swapped out. More than this is sure to fail."""
    return _memory(root, caches=2, swap=swap)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be had without swapping: MemAvailable, or what the control group still may take.

    Of the file cache that a group is charged for, the inactive part counts as free, as the kubelet has it: otherwise
    reading large files would look like a lack of memory.
    """
    return _memory(root, caches=1, swap=False)


def _memory(root: Path, caches: int, swap: bool) -> int:
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    swappable = int(fields["SwapFree"].split()[0]) << 10 if swap and "SwapFree" in fields else 0
    for folder, limit, used, *cache in CGROUPS:
        group = root / folder
        if (group / limit).is_file() and (most := (group / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(part, 0)) for part in cache[:caches])
            available = min(available, int(most) - int((group / used).read_text()) + cached)
    return max(0, available + swappable)


def allocate(
    slots: int,
    spec: DecoderSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device,
    groups: Groups | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pools (K, V) by layer, [slots + 1, kv_heads, head_dim] each, of zeros: one for the layers that share it. On a CPU
    pages are touched only as slots are used.

    Raises MemoryError where the device does not give them, with the number of tokens that may have theirs.
    """
    shape = (slots + 1, shard.kv_heads, spec.head_dim)
    groups = groups or one(spec)
    made: list[torch.Tensor] = []
    try:
        while len(made) < 2 * groups.pools:
            made.append(_zeros(shape, dtype, device))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not fit.ran_out(error):
            raise
        on_gpu, given = device.type == "cuda", sum(tensor.nbytes for tensor in made)
        free = torch.cuda.mem_get_info(device)[0] + given if on_gpu else obtainable_memory()
        per_slot, tokens = bytes_per_slot(spec, shard, dtype, groups), slots // groups.each
        fits = fewer(tokens, per_slot, groups.each, free - on_gpu * ROUNDING, given)
        raise MemoryError(fit.not_given(tokens, (slots + 1) * per_slot, free, fits, on_gpu=on_gpu)) from error
    pools = list(zip(made[::2], made[1::2], strict=True))
    return [pools[pool] for _, pool in groups.places]


def fewer(tokens: int, per_slot: int, each: int, free: int, given: int) -> int:
    """Tokens, of `each` slots, for which there is memory where a device did not give that of so many: the `free` bytes,
    but no more than it had `given` when it refused more. 0 where neither says that there is less than for `tokens`."""
    fits = max(0, (min(free, given or free) // per_slot - 1) // each)
    return fits if fits < tokens else 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page: 4 GiB and a second at the start. numpy asks the system for pages of zeros.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
