import random

import pytest
from plain_worker import ask

from aiollm.engine.queue import LATE_SECONDS, PRIORITY_SECONDS, Queue


def asked(arrived=0.0, key="", priority=0, patience=None, prompt=4):
    request = ask([1] * prompt, 4, arrived)
    request.key, request.priority, request.patience = key, priority, patience
    return request


def queued(queue, *requests):
    for request in requests:
        queue.push(request)
    return requests


def order_of(queue, now=0.0):
    """Serve everybody, one after the other."""
    served = []
    while (head := queue.head(now)) is not None:
        queue.remove(head)
        served.append(head)
    assert not len(queue) and not list(queue) and queue.tokens == 0
    return served


@pytest.mark.parametrize("order", ["fcfs", "fair", "deadline", "sla"])
def test_equals_are_served_as_they_came(order):
    queue = Queue(order)
    requests = [asked(at // 2) for at in range(10)]
    queued(queue, *requests)
    assert list(queue) == requests and order_of(queue) == requests


@pytest.mark.parametrize("order", ["fcfs", "fair", "deadline", "sla"])
def test_priority_is_worth_some_waiting_and_no_more(order):
    queue = Queue(order, target=1000.0)
    low, high = asked(0.0, priority=1), asked(PRIORITY_SECONDS - 1)
    late = asked(PRIORITY_SECONDS + 1, priority=0)
    queued(queue, low, high, late)
    assert order_of(queue) == [high, low, late]


@pytest.mark.parametrize("order", ["fcfs", "fair", "deadline", "sla"])
def test_who_ran_before_comes_first(order):
    queue = Queue(order)
    new, *ran = (asked(at) for at in (0.0, 5.0, 4.0))
    for request in ran:
        request.admitted = 4.5
    queued(queue, new, *ran)
    assert list(queue.returned) == ran[::-1]
    assert order_of(queue) == [*ran[::-1], new]


def test_nobody_waits_for_ever_whatever_others_ask_for():
    """One request of the lowest priority, and a flood of the highest that never ends."""
    for order in ("fcfs", "fair", "deadline", "sla"):
        queue, now = Queue(order), 0.0
        poor = asked(0.0, key="poor", priority=100, patience=3600.0)
        queue.push(poor)
        while queue.head(now) is not poor:
            now += 1.0
            queue.push(asked(now, key="rich", priority=-100, patience=1.0))
            head = queue.head(now)
            if head is not poor:
                queue.remove(head)
                queue.serve(head, 4)
            assert now < 200 * PRIORITY_SECONDS + 3600 + LATE_SECONDS + 10


def test_keys_are_served_in_turn_by_what_they_got():
    queue = Queue("fair")
    greedy = [asked(0.0, "a") for _ in range(6)]
    modest = [asked(1.0, "b") for _ in range(2)]
    queued(queue, *greedy, *modest)
    served = []
    for _ in range(8):
        head = queue.head(1.0)
        queue.remove(head)
        queue.serve(head, 10)
        served.append(head.key)
    assert served[:4].count("b") == 2 and served[4:] == ["a"] * 4


def test_what_was_put_out_counts_twice():
    queue = Queue("fair")
    a, b = queued(queue, asked(0.0, "a"), asked(0.0, "b"))
    queue.serve(a, 10)
    queue.served[queue.lane(b)] += 2 * 6
    assert queue.head(0.0) is a


def test_a_key_that_was_away_has_saved_nothing_up():
    queue = Queue("fair")
    a = queued(queue, asked(0.0, "a"), asked(0.0, "a"))
    queue.serve(a[0], 1000)
    queued(queue, asked(1.0, "b"))
    assert queue.served[queue.lane(asked(0.0, "b"))] == 1000


def test_deadlines_are_those_of_the_clients():
    queue = Queue("deadline", target=10.0)
    patient, usual, hasty = asked(0.0, patience=60.0), asked(1.0), asked(2.0, patience=3.0)
    queued(queue, patient, usual, hasty)
    assert order_of(queue, 50.0) == [hasty, usual, patient]


def test_who_cannot_be_served_in_time_any_more_stands_back_for_a_while():
    queue = Queue("sla", target=10.0)
    late, punctual = queued(queue, asked(0.0), asked(8.0))
    assert queue.head(9.0) is late
    assert queue.head(11.0) is punctual
    (newer,) = queued(queue, asked(LATE_SECONDS + 1.0))
    queue.remove(punctual)
    assert order_of(queue, LATE_SECONDS + 2.0) == [late, newer], "later than that nobody goes before it"


def test_tokens_and_requests_are_counted_by_key():
    queue = Queue()
    a, *_ = queued(queue, asked(key="a", prompt=5), asked(key="b", prompt=7), asked(key="a", prompt=1))
    assert (len(queue), queue.tokens, queue.waiting("a"), queue.waiting("b"), queue.waiting("c")) == (3, 13, 2, 1, 0)
    queue.remove(a)
    assert (len(queue), queue.tokens, queue.waiting("a")) == (2, 8, 1)
    with pytest.raises(KeyError):
        queue.remove(a)


@pytest.mark.parametrize("order", ["fcfs", "fair", "deadline", "sla"])
def test_any_order_of_pushes_and_removals_agrees_with_a_list(order):
    rng = random.Random(0)
    queue, waiting = Queue(order, target=5.0), []
    for now in range(3000):
        if rng.random() < 0.55 or not waiting:
            waiting.append(asked(float(now), rng.choice("abc"), rng.randrange(-3, 3), rng.choice([None, 5.0, 50.0])))
            if rng.random() < 0.2:
                waiting[-1].admitted = float(now)
            queue.push(waiting[-1])
        else:
            gone = queue.head(float(now)) if rng.random() < 0.5 else rng.choice(waiting)
            waiting.remove(gone)
            queue.remove(gone)
        assert len(queue) == len(waiting) and queue.tokens == 4 * len(waiting)
        assert (queue.head(float(now)) is None) == (not waiting)
    assert set(map(id, queue)) == set(map(id, waiting))
    heaps = [*queue._lanes, queue._returned, queue._late]
    assert sum(len(lane.heap) for lane in heaps) <= 2 * len(waiting) + len(heaps), "the dead are buried"
