"""Fresh memory is NaN in kernel tests: an operation that reads what it never wrote shows it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


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
