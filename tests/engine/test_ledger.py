import numpy as np
import pytest
from plain_worker import Stand, answered, ask, chunks, count_to, sink

from aiollm.wire.messages import Update
from aiollm.wire.sampling import AllowedIds


def test_a_second_request_computes_only_what_the_first_did_not():
    stand = Stand()
    a = ask(count_to(12), 4)
    stand.submit(a)
    stand.finish()
    before = stand.worker.computed
    b = ask([*count_to(12), 9, 9], 4)
    stand.submit(b)
    stand.finish()
    assert stand.worker.computed - before == 2 and b.cached_tokens == 12
    assert answered(a, b)


def test_the_output_of_a_request_is_cached_too_but_for_its_last_token():
    stand = Stand()
    a = ask(count_to(12), 6)
    stand.submit(a)
    stand.finish()
    b = ask([*count_to(12), *sink(a).ids, 3], 2)
    stand.submit(b)
    stand.finish()
    assert b.cached_tokens == 12 + 5
    assert answered(b)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    stand = Stand()
    first, again = ask(count_to(12), 4), ask(count_to(12), 4)
    stand.submit(first)
    stand.finish()
    before = stand.worker.computed
    stand.submit(again)
    stand.finish()
    assert stand.worker.computed - before == 1 and again.cached_tokens == 11
    assert answered(again)


def test_the_last_token_of_a_constrained_prompt_is_nobody_else_s_while_its_row_runs():
    """It may be computed again, and that may fail."""
    stand = Stand(rows=4)
    first = ask(count_to(12), 4, constraints=(AllowedIds(tuple(range(100))),))
    others = [ask([*count_to(12), 9, 9], 4) for _ in range(2)]
    stand.submit(first)
    stand.round()
    stand.submit(others[0])
    stand.round()
    assert others[0].cached_tokens == 11
    stand.finish()
    stand.submit(others[1])
    stand.finish()
    assert others[1].cached_tokens > 11
    assert answered(first, *others)


@pytest.mark.parametrize("budget", [64, 5])
def test_copies_of_a_prompt_share_it_even_when_they_come_together(budget):
    stand = Stand(rows=4, chunk_budget=budget, chunk_size=budget)
    copies = [ask(count_to(15), 4) for _ in range(4)]
    stand.submit(*copies)
    if budget > 15:
        update = stand.plan()
        assert update is not None and [count for _, _, count in chunks(update)] == [15, 1, 1, 1]
    stand.finish()
    assert stand.worker.computed == 15 + 3
    assert answered(*copies)


def test_prompt_logprobs_need_every_token_computed():
    stand = Stand()
    stand.submit(ask(count_to(12), 2))
    stand.finish()
    before = stand.worker.computed
    request = ask(count_to(12), 2, prompt_logprobs=0)
    stand.submit(request)
    stand.finish()
    assert stand.worker.computed - before == 12 and request.cached_tokens == 0
    assert [int(token.logprob) for token in sink(request).prompt] == count_to(12)[1:]
    assert answered(request)


def test_prompt_logprobs_survive_a_pause_once_each():
    stand = Stand(chunk_budget=5)
    request = ask(count_to(12), 4, prompt_logprobs=0)
    stand.submit(request)
    stand.round()
    stand.round()
    stand.core.pause(request)
    stand.finish()
    assert [int(token.logprob) for token in sink(request).prompt] == count_to(12)[1:]
    assert answered(request)


def test_namespaces_do_not_share():
    stand = Stand()
    for salt in ("a", "b", "a"):
        request = ask(count_to(12), 2, namespace=salt)
        stand.submit(request)
        stand.finish()
        assert answered(request)
    assert stand.worker.computed == 12 + 12 + 1


def test_namespaces_of_clients_that_went_leave_nothing_behind():
    stand = Stand(slots=40, prefix_cache=True)
    for at in range(50):
        request, other = ask(count_to(12), 2, namespace=f"salt {at}"), ask(count_to(30), 8, namespace=f"other {at}")
        stand.submit(request, other)
        stand.plan()
        stand.core.abort(other)
        stand.finish()
    assert len(stand.core.ledger.index.roots) <= 40 / 12 + 1


def test_without_the_prefix_cache_everything_is_computed_and_given_back():
    stand = Stand(prefix_cache=False)
    requests = [ask(count_to(12), 4) for _ in range(3)]
    stand.submit(*requests)
    stand.finish()
    assert stand.worker.computed == 36 and stand.core.ledger.pool.free == 100
    assert answered(*requests)


def test_what_is_lent_stays_until_it_is_settled():
    stand = Stand(rows=1, slots=30)
    first = ask(count_to(10), 2)
    stand.submit(first)
    stand.finish()
    loan = stand.core.ledger.lend("", np.array(count_to(10), np.int64))
    assert loan.slots.shape == (1, 10)
    stand.submit(ask(count_to(12, 1), 8))
    stand.finish()
    assert stand.core.ledger.lend("", np.array(count_to(10), np.int64)).slots.tolist() == loan.slots.tolist()
    stand.core.ledger.settle(loan)
    stand.core.ledger.settle(loan)
    stand.submit(ask(count_to(20, 2), 8))
    stand.finish()
    assert len(stand.core.ledger.lend("", np.array(count_to(10), np.int64)).slots[0]) < 10


def test_only_what_was_published_is_lent():
    stand = Stand(chunk_budget=6)
    stand.submit(ask(count_to(12), 2))
    stand.round()
    stand.plan()
    loan = stand.core.ledger.lend("", np.array(count_to(12), np.int64))
    assert loan.slots.shape == (1, 6)
    stand.core.ledger.settle(loan)
    stand.die()
    stand.core.ledger.settle(loan)
    stand.finish()


def test_nothing_to_tell_is_no_update():
    stand = Stand()
    assert stand.plan() is None
    stand.submit(ask(count_to(4), 2))
    first = stand.plan()
    assert isinstance(first, Update) and first.number == 1
    assert stand.plan() is None
