"""How far an implementation may lie from the reference: one table, by dtype, used by every kernel test."""

import torch

# dtype: (rtol, atol). A few units in the last place of a result of size 1 after sums of up to a thousand terms.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare shape, dtype and values; the tolerance is that of `actual`'s dtype. NaN equals nothing."""
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
