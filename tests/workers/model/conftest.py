"""Tiny models are computed by one thread."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """For every test of this folder."""
