"""Whether a model fits on its device, said before anything of it is read; and what is said where memory runs out later.

Figures in, sentences out: nothing here asks a device.
"""

import torch

# A phase of the start -> what makes it take less memory, beside what always helps.
LESS = {
    "measuring memory": "lower --batch_max_tokens or --running_max_req_size",
    "allocating the KV cache": "lower --max_total_token_num or --mem_fraction",
    "warming up": "lower --max_total_token_num or --mem_fraction",
    "capturing graphs": "lower --max_total_token_num or --mem_fraction, or serve without graphs (--disable_cudagraph)",
}
TABLES = "lower --running_max_req_size or --max_req_total_len, which the row tables follow from"


def check(
    weights: int, tables: int, free: int, total: int, *, on_gpu: bool, data_type: str, fraction: float = 1.0
) -> None:
    """Raises MemoryError where weights and row tables, in bytes, are more than may be taken of the `free` bytes of a
    device of `total`: all of them, but what is beyond `fraction` of the total."""
    room = max(0, free - int(total * (1 - fraction)))
    if weights + tables <= room:
        return
    device = "the GPU" if on_gpu else "this machine"
    held = f", of which --mem_fraction {fraction:g} leaves {gib(room)}" if fraction < 1 else ""
    helps = [TABLES] if tables > room // 8 else []
    if weights > room // 2:
        helps += ["share the model out among GPUs (--tp)"] if on_gpu else []
        helps += ["raise --mem_fraction"] if weights + tables <= free and fraction < 1 else []
        helps += [_smaller(on_gpu)] if data_type == "fp32" else []
        helps += ["choose a smaller model"]
    raise MemoryError(
        f"weights of {gib(weights)} ({data_type}) and row tables of {gib(tables)} do not fit: {device} has {gib(free)}"
        f" free{held}; {', or '.join(helps or ['free memory'])}"
    )


def ran_out(error: Exception) -> bool:
    """Whether an error of torch says that a device has no memory left: its allocator, or the driver, or the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error: out of memory" in said or "DefaultCPUAllocator" in said)


def exhausted(phase: str, *, on_gpu: bool) -> str:
    """A sentence for the user whose start ran out of memory in this phase."""
    device = "the GPU" if on_gpu else "this machine"
    smaller = "share the model out among GPUs (--tp), " if on_gpu else ""
    helps = LESS.get(phase, f"{smaller}take a --data_type of fewer bits, {TABLES}")
    return f"{device} ran out of memory while {phase}: {helps}, free memory, or choose a smaller model"


def gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 // 10 else f"{amount / 2**20:.1f} MiB"


def _smaller(on_gpu: bool) -> str:
    return f"take a --data_type of fewer bits ({'bf16 or fp16' if on_gpu else 'bf16, fp16 or int8'})"
