import pytest

from aiollm.engine.pace import FIRST_RETRY, LEAST_CHUNK, LONGEST_RETRY, PIECE, STEP, ChunkBudget, Drain
from aiollm.workers import sizes


def taught(target=0.1, decode=0.02, each=0.0001, most=2048):
    budget = ChunkBudget(most, target)
    for _ in range(50):
        budget.observe(decode, 0)
        budget.observe(decode + 500 * each, 500)
    return budget


def test_the_budget_is_what_the_target_leaves():
    assert taught(each=0.00015).tokens(streams=3) == pytest.approx(533, rel=0.01)


@pytest.mark.parametrize("streams", [1, 95, 127, 128, 300, 900, 1024])
def test_it_grows_with_the_streams_up_to_the_whole_and_fills_a_size_of_the_workers_with_them(streams):
    tokens = ChunkBudget(2048, 0.0).tokens(streams)
    assert tokens + streams in sizes.mixed_sizes(4096)
    assert -STEP < tokens - min(2048, PIECE + 2 * streams) <= 0


def test_where_nobody_waits_and_where_it_is_small_it_is_the_whole():
    assert taught().tokens(0) == ChunkBudget(2048, 0.0).tokens(0) == 2048
    assert ChunkBudget(200, 0.0).tokens(3) == 200


def test_a_target_is_nothing_before_something_was_learnt():
    assert ChunkBudget(2048, 0.1).tokens(3) == taught(target=0.0).tokens(3) == PIECE - 3


def test_prompts_go_on_even_where_decoding_alone_is_too_slow():
    assert taught(decode=0.5).tokens(3) == LEAST_CHUNK
    assert taught(decode=0.5, most=10).tokens(3) == 10


def test_what_takes_no_time_and_small_chunks_teach_nothing():
    budget = taught()
    before = budget.tokens(3)
    budget.observe(0.0, 500)
    budget.observe(9.0, 3)
    assert budget.tokens(3) == before


def test_the_budget_follows_a_machine_that_gets_slower():
    budget = taught()
    for _ in range(50):
        budget.observe(0.02 + 500 * 0.0004, 500)
    assert budget.tokens(3) == pytest.approx(200, rel=0.05)


def test_the_rate_is_that_of_the_latest_requests():
    drain = Drain()
    assert drain.rate(1.0) == 0.0 and drain.retry_after(1.0, 10) == FIRST_RETRY
    for at in range(200):
        drain.left(at * 0.5)
    assert drain.rate(99.5) == pytest.approx(2.0)
    assert drain.retry_after(99.5, 10) == 5
    assert drain.rate(120.0) < 1.5, "nobody left since"
    assert drain.rate(199.5) == 0.0 and drain.retry_after(199.5, 10) == FIRST_RETRY, "that was long ago"


def test_retries_are_whole_seconds_between_one_and_what_clients_obey():
    drain = Drain()
    drain.left(50.0)
    drain.left(100.0)
    assert drain.retry_after(100.0, 1000) == LONGEST_RETRY
    for _ in range(64):
        drain.left(100.0)
    assert drain.retry_after(100.0, 1) == 1
