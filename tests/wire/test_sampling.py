import msgspec
import pytest

from aiollm.wire.sampling import SamplingParams


def test_a_request_that_asks_for_nothing_draws_from_the_whole_distribution() -> None:
    p = SamplingParams()
    assert (p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1, 0, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty, p.logit_bias) == (0, 0, 1, {})


def test_parameters_cross_the_border_unchanged_and_cannot_be_changed_then() -> None:
    params = SamplingParams(seed=2**63 - 1, logit_bias={7: -100.0}, stop_ids=(1, 2), top_p=0.1)
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert arrived == params
    with pytest.raises(AttributeError):
        arrived.seed = 1
