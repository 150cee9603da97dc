import pytest

from aiollm.wire.sampling import SamplingParams


def test_a_request_that_asks_for_nothing_has_no_penalty_and_no_bias() -> None:
    params = SamplingParams()
    assert not params.has_penalty
    assert not params.logit_bias and not params.stop_ids


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_each_penalty_counts(field: str) -> None:
    assert SamplingParams(**{field: 0.5}).has_penalty
    assert SamplingParams(**{field: 1.5}).has_penalty
