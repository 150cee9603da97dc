"""How far an implementation may lie from the reference: one table, by dtype, used by every kernel test."""

import math

import torch

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
