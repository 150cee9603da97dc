"""How far an implementation may lie from the reference: one table, by dtype, used by every kernel test."""

import math

import torch

from aiollm.kernels.batch import Sampled, Sampling
from aiollm.kernels.ref.random import uniform
from aiollm.kernels.ref.sample import add_bias, gathered, penalize

# dtype: (rtol, atol). A few units in the last place of a result of size 1 after sums of up to a thousand terms.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def assert_near(actual: torch.Tensor, exact: torch.Tensor, chains: int = 1) -> None:
    """For a chain of operations, which may round to `actual`'s dtype in between: compare with the chain in float32.

    The error is measured against the size of all values: where values cancel, what was rounded before does not. Errors
    of several `chains` that are added up do not depend on each other, and grow with the root of their number.
    """
    rtol = TOLERANCE[actual.dtype][0] * math.sqrt(chains)
    error = actual.float() - exact.float()
    assert actual.shape == exact.shape and bool(error.norm() <= rtol * exact.float().norm())
    assert not exact.numel() or bool(error.abs().max() <= 4 * rtol * exact.float().abs().max())


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare shape, dtype and values; the tolerance is that of `actual`'s dtype. NaN equals nothing."""
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_drawn(logits: torch.Tensor, sampling: Sampling, drawn: Sampled, expected: Sampled) -> None:
    """Every token is the `expected` one of the reference, or would be if weights were rounded a little otherwise."""
    own = gathered(sampling)
    others = (drawn.tokens != expected.tokens).nonzero().flatten().tolist()
    numbers = uniform(own.seeds, own.lengths).tolist() if others else []
    processed = penalize(add_bias(logits.float(), own), own) if others else logits
    for i in others:
        temperature, top_k, top_p, min_p = (
            getattr(own, name)[i].item() for name in ("temperature", "top_k", "top_p", "min_p")
        )
        token = int(drawn.tokens[i])
        assert temperature > 0 and token >= 0, f"row {i}: {token}, not {expected.tokens[i]}"
        near = _near_draw(processed[i].double(), temperature, top_k, top_p, min_p, numbers[i], token)
        assert near, f"row {i}: {token}, not {expected.tokens[i]}, nor near it"
    alike = drawn.tokens == expected.tokens
    assert_close(drawn.logprobs[alike], expected.logprobs[alike])
    assert_close(drawn.top_logprobs, expected.top_logprobs)


def _near_draw(
    x: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, number: float, token: int
) -> bool:
    """Whether `number` draws `token` where the number and top_p may be off by 1e-5, and min_p by so much of it."""
    off = 1e-5
    weights = ((x - x.max()) / temperature).exp()
    _, ids = x.sort(descending=True, stable=True)
    ordered = weights[ids][: top_k or None]
    before = ordered.cumsum(0) - ordered
    low, high = (int((before < (top_p + d) * ordered.sum()).sum()) for d in (-off, off))
    for count in range(max(low, 1), high + 1):
        kept = torch.zeros_like(weights).index_fill(0, ids[:count], 1.0)
        for least in (min_p * (1 - off), min_p * (1 + off)):
            mass = (weights * kept * (weights >= least)).cumsum(0) / (weights * kept * (weights >= least)).sum()
            start = mass[token - 1] if token else 0.0
            if mass[token] > start and start - off <= number <= mass[token] + off:
                return True
    return False
