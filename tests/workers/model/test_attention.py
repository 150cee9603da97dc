import pytest

from aiollm.workers.model.attention import alibi_slopes


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16)[:3].tolist() == pytest.approx([2**-0.5, 2**-1, 2**-1.5])
    assert alibi_slopes(12)[7:].tolist() == pytest.approx([2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
