"""The KV pools: how many slots fit, and the tensors they live in. One slot per token, plus one that takes padding."""

from pathlib import Path

import torch

from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard

CPU_MOST = 4 << 30  # bytes of KV on a CPU unless --max_total_token_num says otherwise: a laptop has other work too


def bytes_per_slot(spec: DecoderSpec, shard: Shard, dtype: torch.dtype) -> int:
    """Keys and values of one token, all layers, on this rank."""
    return 2 * spec.layers * shard.kv_heads * spec.head_dim * dtype.itemsize


def fitting(per_slot: int, device: torch.device, fraction: float) -> int:
    """Slots that fit into the memory that is free now, of which `fraction` may be used."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - int(total * (1 - fraction))
    else:
        room = min(CPU_MOST, int(available_memory() * fraction))
    slots = room // per_slot
    if slots < 64:
        raise MemoryError(
            f"{max(0, room) >> 20} MiB are left for the KV cache, and one token takes {per_slot} bytes:"
            " raise --mem_fraction, free memory, or choose a smaller model"
        )
    return slots


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping (MemAvailable, or the cgroup's limit where it is less)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available


def allocate(
    slots: int, spec: DecoderSpec, shard: Shard, dtype: torch.dtype, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pools (K, V) per layer, [slots + 1, kv_heads, head_dim] each. Pages are touched only as slots are used."""
    shape = (slots + 1, shard.kv_heads, spec.head_dim)
    return [
        (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(spec.layers)
    ]
