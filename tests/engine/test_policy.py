import numpy as np
import pytest
from foreseen import new, view

from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture


def taught(policy, lengths):
    for length in lengths:
        policy.history.add(None, length)
    return policy


def admitted(policy, slots=10_000, held=100, cap=1000, certain=False, most=1000):
    """How many equal requests one round takes in."""
    gauge = policy.open(view(slots=slots))
    for count in range(most):
        if not gauge.join([new(held, cap, certain)]):
            return count
    return most


def test_conservative_takes_what_fits_at_its_longest():
    assert admitted(Conservative()) == 10_000 // 1099


def test_aggressive_takes_what_fits_now():
    assert admitted(Aggressive()) == 99 and admitted(Aggressive(0.5)) == 50


def test_past_future_takes_what_the_past_says():
    assert 40 <= admitted(taught(PastFuture(reserve=0.02), [100] * 500), most=200) <= 49, (
        "about 200 slots each, and a reserve"
    )
    assert admitted(taught(PastFuture(), [900] * 500)) <= 10


def test_lengths_that_are_certain_fill_the_pool_whatever_the_past_was():
    assert admitted(taught(PastFuture(), [10] * 500), slots=10_990, certain=True) == 10


def test_past_future_foresees_that_rows_end():
    """Ten rows are about to end, as all did before; the newcomer will have grown only then."""
    policy = taught(PastFuture(reserve=0.0), [100] * 500)
    ending = view(held=[100] * 10, done=[99] * 10, cap=[200] * 10, slots=1150)
    fresh = view(held=[100] * 10, done=[0] * 10, cap=[200] * 10, slots=1150)
    assert policy.open(ending).join([new(100, 200)]) and not policy.open(fresh).join([new(100, 200)])


def test_every_round_draws_anew():
    policy = taught(PastFuture(), range(1, 1000))
    seen = view(held=[10] * 5, done=[0] * 5, cap=[1000] * 5, slots=10_000)
    assert len({policy.worst(seen) for _ in range(20)}) > 10


def test_the_largest_of_several_draws_counts():
    seen = view([10] * 5, [0] * 5, [1000] * 5)

    def foreseen(draws):
        return np.mean([taught(PastFuture(draws=draws, seed=at), range(1, 1000)).worst(seen) for at in range(30)])

    assert foreseen(5) > foreseen(1)


@pytest.mark.parametrize(("token_ratio", "expected"), [(0.0, 9), (0.95, 10)])
def test_lightllm_takes_the_worst_case_when_busy(token_ratio, expected):
    """1,099 and 16 slots each while busy; else 500, until 9,500 are in use."""
    gauge = LightLLM(token_ratio, 400).open(view(held=[100], done=[0], cap=[1000], slots=10_600))
    assert sum(gauge.join([new(100, 1000)]) for _ in range(50)) + 1 >= expected


def test_lightllm_guesses_a_tenth_more_than_there_is():
    policy = LightLLM(0.99, 50)
    assert policy.worst(view(held=[300], done=[200], cap=[1000], slots=10_000)) == 300 + 220 + 16 - 200 - 1
    assert policy.worst(view(held=[110], done=[10], cap=[1000], slots=10_000)) == 110 + 50 + 16 - 10 - 1
    assert policy.worst(view(held=[110], done=[10], cap=[1000], certain=[True], slots=10_000)) == 110 + 1000 + 5


@pytest.mark.parametrize("policy", [Conservative(), Aggressive(), PastFuture(), LightLLM()])
def test_nobody_runs(policy):
    assert policy.worst(view()) == 0 and policy.open(view()).join([new(5, 5)])
