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
SHARED = "share the model out among GPUs (--tp)"


def check(
    weights: int, tables: int, cache: int, free: int, total: int, *, on_gpu: bool, data_type: str, fraction: float = 1.0
) -> None:
    """Raises MemoryError where weights, row tables and the least KV cache, in bytes, are more than may be taken of the
    `free` bytes of a device of `total`: all of them, but what is beyond `fraction` of the total."""
    room = max(0, free - int(total * (1 - fraction)))
    needed = weights + tables + cache
    if needed <= room:
        return
    held = f", of which --mem_fraction {fraction:g} leaves {gib(room)}" if fraction < 1 else ""
    enough = least_fraction(needed, free, total)
    helps = [f"raise --mem_fraction to {enough}"] if fraction < 1 and enough else []
    helps += [TABLES] if tables > needed // 8 else []
    if weights > needed // 2:
        helps += [SHARED] if on_gpu else []
        helps += [_smaller(on_gpu)] if data_type == "fp32" else []
        helps += ["choose a smaller model"]
    raise MemoryError(
        f"weights of {gib(weights)} ({data_type}), row tables of {gib(tables)} and a KV cache of at least {gib(cache)}"
        f" do not fit: {_name(on_gpu)} has {gib(free)} free{held}; {', '.join(helps or ['free memory'])}"
    )


def least_fraction(needed: int, free: int, total: int) -> str:
    """The least --mem_fraction, to two digits, that leaves `needed` of the `free` bytes of a device of `total`; empty
    where none does."""
    percent = 100 - (free - needed) * 100 // max(1, total)
    return f"{percent / 100:.2f}" if percent <= 100 else ""


def granted(asked: int, fits: int, advised: int, beside: str = "") -> int:
    """`asked` tokens of KV cache. Raises MemoryError where fewer fit, with the number that is `advised`, because it
    leaves others the share that --mem_fraction says, or what fits where that is nothing. `beside` says what is not
    loaded yet: the number is a bound then, for more than that will be taken."""
    if asked <= fits:
        return asked
    bound = "at most about " if beside else ""
    would = f"{bound}{advised or fits} would" if fits else "nothing is left for the KV cache"
    raise MemoryError(f"--max_total_token_num {asked} does not fit{beside}: {would}")


def not_given(tokens: int, asked: int, free: int, fits: int, *, on_gpu: bool) -> str:
    """A sentence for the user whose KV cache of so many tokens, `asked` bytes, an allocator did not give. So many bytes
    were `free`; `fits` tokens may have their memory, 0 where that is not known."""
    value = f"--max_total_token_num {fits} would fit" if fits else "lower --max_total_token_num"
    shared = f"{SHARED}, " if on_gpu else ""
    return (
        f"a KV cache of {tokens} tokens takes {gib(asked)}, which {_name(on_gpu)} did not give ({gib(free)} were free):"
        f" {value}; {shared}free memory, or choose a smaller model"
    )


def ran_out(error: Exception) -> bool:
    """Whether an error of torch says that a device has no memory left: its allocator, or the driver, or the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("CUDA error: out of memory" in said or "DefaultCPUAllocator" in said)


def exhausted(phase: str, *, on_gpu: bool) -> str:
    """A sentence for the user whose start ran out of memory in this phase."""
    shared = f"{SHARED}, " if on_gpu else ""
    helps = LESS.get(phase, f"{shared}take a --data_type of fewer bits, {TABLES}")
    return f"{_name(on_gpu)} ran out of memory while {phase}: {helps}, free memory, or choose a smaller model"


def gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 // 10 else f"{amount / 2**20:.1f} MiB"


def _name(on_gpu: bool) -> str:
    return "the GPU" if on_gpu else "this machine"


def _smaller(on_gpu: bool) -> str:
    return f"take a --data_type of fewer bits ({'bf16 or fp16' if on_gpu else 'bf16, fp16 or int8'})"
