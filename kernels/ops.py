"""The tables of operations. One decoder serves every table; a table is a plain value and is passed by value.

`reference_ops()` is the specification: torch, fp32 inside, unclever. `cpu_ops()` serves on a CPU, `triton_ops()` on a
GPU.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from aiollm.kernels.batch import Batch, Sampled, Sampling
from aiollm.kernels.variants import Norm, Scoring
from aiollm.kernels.weight import Int8Weight

Tensor = torch.Tensor


class Ops(NamedTuple):
    """Signatures are those of the functions in `kernels/ref`; each is documented there."""

    inputs: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    embedding: Callable[[Tensor, Tensor], Tensor]
    norm: Callable[[Tensor, Norm], Tensor]
    add_norm: Callable[[Tensor, Tensor, Norm], tuple[Tensor, Tensor]]
    quantize: Callable[[Tensor], Int8Weight]
    linear: Callable[..., Tensor]
    gated_linear: Callable[..., Tensor]
    rotary_store: Callable[..., Tensor]
    plan: Callable[[Batch, int], Batch]
    attention: Callable[[Tensor, Tensor, Tensor, Batch, Scoring], Tensor]
    gated: Callable[[Tensor, str], Tensor]
    sample: Callable[[Tensor, Sampling], Sampled]
    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
    store: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def reference_ops() -> Ops:
    """The specification of every operation, for any device and dtype."""
    from aiollm.kernels.ref.attention import attention
    from aiollm.kernels.ref.embedding import embedding
    from aiollm.kernels.ref.gated import gated
    from aiollm.kernels.ref.gated_linear import gated_linear
    from aiollm.kernels.ref.inputs import inputs
    from aiollm.kernels.ref.linear import linear
    from aiollm.kernels.ref.logprobs import logprobs
    from aiollm.kernels.ref.norm import add_norm, norm
    from aiollm.kernels.ref.plan import plan
    from aiollm.kernels.ref.quantize import quantize
    from aiollm.kernels.ref.rotary_store import rotary_store
    from aiollm.kernels.ref.sample import sample
    from aiollm.kernels.ref.store import store

    return Ops(
        inputs=inputs,
        embedding=embedding,
        norm=norm,
        add_norm=add_norm,
        quantize=quantize,
        linear=linear,
        gated_linear=gated_linear,
        rotary_store=rotary_store,
        plan=plan,
        attention=attention,
        gated=gated,
        sample=sample,
        logprobs=logprobs,
        store=store,
    )


def cpu_ops() -> Ops:
    """The reference where it is fast enough on a CPU, and the faster functions of `kernels/cpu` where it is not."""
    from aiollm.kernels.cpu.attention import attention
    from aiollm.kernels.cpu.linear import gated_linear, linear
    from aiollm.kernels.cpu.norm import norm
    from aiollm.kernels.cpu.plan import plan
    from aiollm.kernels.cpu.quantize import quantize
    from aiollm.kernels.cpu.rotary_store import rotary_store
    from aiollm.kernels.cpu.sample import sample

    return reference_ops()._replace(
        norm=norm,
        quantize=quantize,
        linear=linear,
        gated_linear=gated_linear,
        rotary_store=rotary_store,
        plan=plan,
        attention=attention,
        sample=sample,
    )


def triton_ops() -> Ops:
    """The Triton kernels; the reference where there is none."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # from 3.10 on Triton rounds a * b + c twice without it
    from aiollm.kernels.attention import attention
    from aiollm.kernels.embedding import embedding
    from aiollm.kernels.gated import gated
    from aiollm.kernels.inputs import inputs
    from aiollm.kernels.linear import gated_linear, linear
    from aiollm.kernels.logprobs import logprobs
    from aiollm.kernels.norm import add_norm, norm
    from aiollm.kernels.plan import plan
    from aiollm.kernels.rotary_store import rotary_store
    from aiollm.kernels.sample import sample
    from aiollm.kernels.store import store

    return reference_ops()._replace(
        inputs=inputs,
        embedding=embedding,
        norm=norm,
        add_norm=add_norm,
        linear=linear,
        gated_linear=gated_linear,
        rotary_store=rotary_store,
        plan=plan,
        attention=attention,
        gated=gated,
        sample=sample,
        logprobs=logprobs,
        store=store,
    )
