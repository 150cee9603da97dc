import pytest
from plain_worker import Stand, ask

from aiollm.engine.pausing import victim
from aiollm.engine.policy import Aggressive
from aiollm.engine.queue import PRIORITY_SECONDS
from aiollm.engine.request import State
from aiollm.engine.scheduler import Service


def running(*arrivals, outputs=(), priorities=()):
    """Rows of requests that arrived at these times, in this order of admission."""
    stand = Stand(rows=8, slots=1000, max_length=100, chunk_budget=100)
    requests = [ask([at + 1] * 3, 40, arrived) for at, arrived in enumerate(arrivals)]
    for request, priority in zip(requests, priorities, strict=False):
        request.priority = priority
    for request in requests:
        stand.submit(request)
        stand.round()
    return list(stand.core.ledger.running.values())


def steps(rows, *counts):
    return dict(zip([row.index for row in rows], counts, strict=True))


def test_who_came_last_makes_room_whenever_it_was_admitted():
    rows = running(1.0, 3.0, 2.0)
    assert victim(rows, "fcfs", {}, 5.0) is rows[1]


def test_of_equals_it_is_who_was_queued_last():
    rows = running(1.0, 1.0, 1.0)
    assert victim(rows, "fcfs", {}, 5.0) is rows[2]


def test_nobody_makes_room_for_himself():
    assert victim([], "fcfs", {}, 0.0) is None and victim(running(1.0), "sjf", {}, 0.0) is None


def test_priority_counts_as_arrival():
    rows = running(0.0, PRIORITY_SECONDS - 1.0, priorities=[1, 0])
    assert victim(rows, "fcfs", {}, 20.0) is rows[0]


def test_the_longest_job_makes_room_but_the_most_senior_never():
    rows = running(1.0, 2.0, 3.0)
    assert victim(rows, "sjf", steps(rows, 90, 50, 10), 5.0) is rows[1]
    assert victim(rows, "sjf", steps(rows, 90, 10, 50), 5.0) is rows[2]


def test_who_waited_least_for_its_size_makes_room():
    rows = running(0.0, 1.0, 2.0)
    assert victim(rows, "hrrn", steps(rows, 10, 10, 10), 5.0) is rows[2]
    assert victim(rows, "hrrn", steps(rows, 10, 90, 10), 5.0) is rows[1], "it is large"


def test_the_lowest_priority_makes_room_first():
    rows = running(0.0, 1.0, 2.0, priorities=[0, 5, 0])
    assert victim(rows[1:] + rows[:1], "sjf", steps(rows, 1, 1, 90), 5.0) is rows[1]


@pytest.mark.parametrize("order", ["fcfs", "sjf", "hrrn"])
def test_rows_that_were_paused_come_back_and_end_under_every_order(order):
    stand = Stand(rows=6, slots=40, policy=Aggressive(), service=Service(pause_order=order))
    requests = [ask([at] * 5, 20 - at, arrived=at) for at in range(6)]
    stand.submit(*requests)
    stand.finish()
    assert all(request.state is State.FINISHED for request in requests)
    assert 0 < stand.core.paused_total < 40 and requests[0].pauses == 0


def test_a_paused_row_is_matched_again_while_its_kv_is_there():
    """What it had computed is in the index: coming back costs its last token."""
    stand = Stand(rows=2, slots=200)
    first, second = ask([1] * 20, 10, 0.0), ask([2] * 20, 10, 1.0)
    stand.submit(first, second)
    for _ in range(5):
        stand.round()
    before = stand.worker.computed
    stand.core.pause(second)
    stand.finish()
    assert second.pauses == 1 and stand.worker.computed == before + 1
