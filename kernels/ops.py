"""The tables of operations. One decoder serves every table; a table is a plain value and is passed by value.

`reference_ops()` is the specification: torch, fp32 inside, unclever. `cpu_ops()` is what serves on a CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from aiollm.kernels.batch import Batch, Sampled, Sampling
from aiollm.kernels.weight import Int8Weight, Weight

Tensor = torch.Tensor


class Ops(NamedTuple):
    """Signatures are those of the functions in `kernels/ref`; each is documented there."""

    embedding: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    quantize: Callable[[Tensor], Int8Weight]
    linear: Callable[[Tensor, Weight, Tensor | None], Tensor]
    rotary_store: Callable[..., Tensor]
    plan: Callable[[Batch, int], Batch]
    attention: Callable[[Tensor, Tensor, Tensor, Batch, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Sampling], Sampled]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def reference_ops() -> Ops:
    """The specification of every operation, for any device and dtype."""
    from aiollm.kernels.ref.attention import attention
    from aiollm.kernels.ref.embedding import embedding
    from aiollm.kernels.ref.linear import linear
    from aiollm.kernels.ref.logprobs import logprobs
    from aiollm.kernels.ref.plan import plan
    from aiollm.kernels.ref.quantize import quantize
    from aiollm.kernels.ref.rms_norm import add_rms_norm, rms_norm
    from aiollm.kernels.ref.rotary_store import rotary_store
    from aiollm.kernels.ref.sample import sample
    from aiollm.kernels.ref.silu_mul import silu_mul

    return Ops(
        embedding=embedding,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        quantize=quantize,
        linear=linear,
        rotary_store=rotary_store,
        plan=plan,
        attention=attention,
        silu_mul=silu_mul,
        sample=sample,
        logprobs=logprobs,
    )


def cpu_ops() -> Ops:
    """The reference where it is fast enough on a CPU, and the faster functions of `kernels/cpu` where it is not."""
    from aiollm.kernels.cpu.attention import attention
    from aiollm.kernels.cpu.linear import linear
    from aiollm.kernels.cpu.plan import plan
    from aiollm.kernels.cpu.quantize import quantize
    from aiollm.kernels.cpu.rms_norm import add_rms_norm, rms_norm
    from aiollm.kernels.cpu.rotary_store import rotary_store
    from aiollm.kernels.cpu.sample import sample

    return reference_ops()._replace(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        quantize=quantize,
        linear=linear,
        rotary_store=rotary_store,
        plan=plan,
        attention=attention,
        sample=sample,
    )
