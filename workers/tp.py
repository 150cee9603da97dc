"""Tensor parallelism: one model over the workers of one host.

Queries, keys, values and the inner layer of the MLP are split by columns, the layers behind them by rows with a sum
over the ranks, the output layer by vocabulary (Shoeybi et al., 2019).
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from aiollm.workers.model.spec import DecoderSpec


class TensorParallel:
    """One rank's view of its group. A group of one communicates nothing and needs no torch.distributed."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self._device = device

    @classmethod
    def join(
        cls, rank: int, size: int, rendezvous: Path, device: torch.device, timeout_seconds: float = 600.0
    ) -> "TensorParallel":
        """Meet the other ranks at the file `rendezvous`, which must be empty or not exist before, and return once all
        are there.

        Ranks of one host only: the transport is bound to the loopback interface unless the environment says otherwise.
        Raises RuntimeError (a torch.distributed error) where a rank does not come within the timeout.
        """
        if size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                init_method=f"file://{rendezvous.absolute()}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=None if device.type == "cpu" else device,
            )
        return cls(rank, size, device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_vocab(self, logits: torch.Tensor) -> torch.Tensor:
        """Shards [r, v] of the ranks -> [r, size * v] on every rank."""
        if self.size == 1:
            return logits
        r, v = logits.shape
        shards = logits.new_empty(self.size, r, v)
        dist.all_gather_into_tensor(shards.view(-1, v), logits.contiguous())
        return shards.transpose(0, 1).reshape(r, self.size * v)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite `x` with that of rank `src`, in place; returns it."""
        if self.size > 1:
            dist.broadcast(x, src)
        return x

    def smallest(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], device=self._device)  # NCCL takes nothing that lies on the host
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


class Shard:
    """What one rank holds of a decoder. Where ranks outnumber the KV heads, each KV head is on several of them."""

    def __init__(self, spec: DecoderSpec, rank: int, size: int) -> None:
        if size not in (possible := possible_sizes(spec)):
            raise ValueError(
                f"--tp {size} cannot share out {spec.heads} query heads, {spec.kv_heads} KV heads and"
                f" {spec.intermediate} MLP columns; possible: {', '.join(map(str, possible))}"
            )
        self.heads = spec.heads // size
        self.kv_heads = max(1, spec.kv_heads // size)
        self.intermediate = spec.intermediate // size
        self.vocab = -(-spec.vocab // size)  # rows of the output layer; the last shards are padded with zeros
        self.first_head = rank * self.heads
        self.first_kv_head = rank * spec.kv_heads // size
        self.first_column = rank * self.intermediate
        self.first_token = min(rank * self.vocab, spec.vocab)
        self.tokens = min(self.vocab, spec.vocab - self.first_token)  # rows that are no padding


def possible_sizes(spec: DecoderSpec) -> list[int]:
    """The numbers of ranks that a decoder can be shared out among."""

    def divides(n: int) -> bool:
        by_kv_head = spec.kv_heads % n == 0 or n % spec.kv_heads == 0
        return by_kv_head and spec.heads % n == 0 and spec.intermediate % n == 0

    return [n for n in range(1, spec.heads + 1) if divides(n)]
