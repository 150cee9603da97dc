"""Tests marked `gpu` are skipped where there is none."""

import os
from collections.abc import Iterator

import pytest

# Where tests run side by side, each process of them and of theirs computes with its share of the cores. Before torch is
# imported: that reads it once.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are computed many times faster by one thread than by several that wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
