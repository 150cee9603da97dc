import pytest

from aiollm.engine.credit import HORIZON, SHARE, CreditPolicy
from aiollm.wire.messages import MOST_CREDIT

PLENTY = 10_000_000


def test_credit_covers_the_horizon_in_steps_of_the_duration_seen():
    policy = CreditPolicy()
    for _ in range(200):
        policy.observe(20_000, stalled=False)
    assert policy.step_seconds == pytest.approx(0.020, rel=1e-3)
    assert policy.ahead(1, PLENTY, PLENTY) in (int(HORIZON / 0.020) + 1, int(HORIZON / 0.020) + 2)


def test_headers_without_a_time_teach_nothing():
    policy = CreditPolicy()
    policy.observe(0, stalled=False)
    assert policy.step_seconds == CreditPolicy().step_seconds


def test_very_short_steps_do_not_take_the_pool():
    policy = CreditPolicy()
    for _ in range(500):
        policy.observe(1, stalled=False)
    assert policy.ahead(1, PLENTY, PLENTY) == MOST_CREDIT


@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
@pytest.mark.parametrize("pool", [100, 10_000, 1_000_000])
def test_all_rows_together_get_at_most_their_share_of_the_pool_but_one_slot_each(rows, pool):
    ahead = CreditPolicy().ahead(rows, pool, pool)
    assert ahead == 1 or ahead * rows <= SHARE * pool


def test_credit_shrinks_to_one_as_the_pool_fills():
    policy = CreditPolicy()
    aheads = [policy.ahead(10, 100_000, available) for available in range(400, -1, -1)]
    assert aheads == sorted(aheads, reverse=True)
    assert aheads[0] > 10 and aheads[-1] == 1
    assert all(ahead == 1 or 2 * 10 * ahead <= 400 - at for at, ahead in enumerate(aheads))


def test_no_decoding_row_is_no_division_by_zero():
    assert CreditPolicy().ahead(0, 1000, 1000) >= 1


def test_a_stall_doubles_credit_for_a_while():
    policy = CreditPolicy()
    policy.step_seconds = 0.04
    assert policy.ahead(1, PLENTY, PLENTY) == int(HORIZON / 0.04) + 2
    policy.observe(40_000, stalled=True)
    assert policy.ahead(1, PLENTY, PLENTY) == int(2 * HORIZON / 0.04) + 2
    for _ in range(10):
        policy.observe(40_000, stalled=True)
    assert policy.ahead(1, PLENTY, PLENTY) == int(8 * HORIZON / 0.04) + 2, "not without end"
    for _ in range(300):
        policy.observe(40_000, stalled=False)
    assert policy.ahead(1, PLENTY, PLENTY) == int(HORIZON / 0.04) + 2
