"""Fresh memory is NaN in kernel tests: an operation that reads what it never wrote shows it.

The Triton kernels run natively where there is a GPU and in Triton's interpreter, on the CPU, where there is none.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by @triton.jit, so before Triton's own functions are imported
    import triton.language as tl
    from triton.runtime import interpreter

    np.seterr(over="ignore")  # a GPU's exp gives inf without a word

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """As a loop's bound, Triton 3.6 converts arrays of one element, which numpy 2.4 refuses; 3.9 does this."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter, 3.9's too, holds bfloat16 as 16-bit integers, which its dot would multiply."""

        def exact(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return create_dot(self, exact(a), exact(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_exact_dot


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """For every test of this folder."""


@pytest.fixture
def device() -> torch.device:
    """Where the Triton kernels of a test run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty, torch.empty_like and Tensor.new_empty return with NaN, or with the lowest integer."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(float("nan"))
            return fresh.fill_(torch.iinfo(fresh.dtype).min) if fresh.dtype != torch.bool else fresh

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
