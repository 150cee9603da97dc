import numpy as np
import pytest
from plain_worker import Stand, answered, ask, count_to

from aiollm.engine.door import ROUND
from aiollm.engine.request import State


def choices(prompt, count, max_tokens=4):
    """Requests with one prompt, as `n` asks for them."""
    array = np.array(prompt, np.int64)
    made = [ask(prompt, max_tokens) for _ in range(count)]
    for request in made:
        request.prompt = array
    return made


def submit_together(stand, requests):
    stand.core.submit(*requests)
    return requests


def test_choices_of_one_prompt_begin_together_or_wait():
    stand = Stand(rows=4, slots=200)
    running = ask(count_to(5, 1), 6)
    stand.submit(running)
    stand.round()
    group = submit_together(stand, choices(count_to(9), 4))
    later = ask(count_to(5, 2), 2, arrived=1.0)
    stand.submit(later)
    stand.round()
    assert {request.state for request in (*group, later)} == {State.WAITING}, "three rows are free, and four wanted"
    while group[0].state is State.WAITING:
        stand.round()
    assert {request.state for request in group} == {State.RUNNING}
    computed = stand.worker.computed
    stand.finish()
    assert answered(running, *group, later)
    assert computed <= 5 + 9 + 3, "the prompt once, and the last token of each"


def test_memory_for_all_of_a_group_is_there_before_the_first_one_begins():
    stand = Stand(rows=8, slots=60, chunk_budget=64, chunk_size=64)
    running = ask(count_to(10, 1), 20)
    stand.submit(running)
    stand.round()
    group = submit_together(stand, choices(count_to(10), 3, 10))
    stand.round()
    assert {request.state for request in group} == {State.WAITING}, "29 and 9 + 3 * 10 of 60"
    stand.finish()
    assert answered(running, *group) and stand.core.paused_total == 0


def test_who_finds_nobody_running_begins_without_a_look():
    stand = Stand(rows=4, slots=200)
    looks = []
    open_gauge = stand.core.policy.open
    stand.core.policy.open = lambda view: looks.append(view) or open_gauge(view)
    alone, second = ask(count_to(5), 6), ask(count_to(5, 1), 6)
    stand.submit(alone)
    stand.round()
    assert alone.state is State.RUNNING and not looks
    stand.submit(second)
    stand.round()
    assert second.state is State.RUNNING and len(looks) == 1
    stand.finish()
    assert answered(alone, second)


@pytest.mark.parametrize(("rows", "slots"), [(2, 200), (8, 30)])
def test_a_group_that_never_fits_as_a_whole_begins_one_by_one(rows, slots):
    stand = Stand(rows=rows, slots=slots)
    group = submit_together(stand, choices(count_to(10), 5, 8))
    stand.finish()
    assert answered(*group)


def test_choices_that_were_aborted_hold_up_nobody():
    stand = Stand(rows=3, slots=200)
    running = ask(count_to(5, 1), 6)
    stand.submit(running)
    stand.round()
    group = submit_together(stand, choices(count_to(9), 3))
    stand.core.abort(group[0])
    stand.round()
    assert [request.state for request in group[1:]] == [State.RUNNING] * 2
    stand.finish()
    assert answered(running, *group[1:])


def test_a_waiting_request_that_does_not_fit_is_looked_at_again_when_something_ended_or_after_a_while():
    stand = Stand(rows=4, slots=40)
    running, waiting = ask(count_to(10), 25), ask(count_to(10, 1), 25)
    stand.submit(running, waiting)
    looks, rounds = [], 0
    open_gauge = stand.core.policy.open
    stand.core.policy.open = lambda view: looks.append(view) or open_gauge(view)
    while waiting.state is State.WAITING:
        stand.round()
        rounds += 1
    assert running.state is State.FINISHED
    assert len(looks) <= 2 + rounds / ROUND
    stand.finish()
    assert answered(running, waiting)


def test_a_waiting_request_is_asked_again_when_its_prefix_has_come_in():
    stand = Stand(rows=2, slots=52, chunk_budget=10, chunk_size=8)
    first, second = ask(count_to(30), 15), ask([*count_to(30), 1], 5)
    stand.submit(first, second)
    stand.round()
    assert second.state is State.WAITING
    while second.state is State.WAITING:
        stand.round()
        assert first.state is State.RUNNING, "30 shared, 14 and 6 of their own"
    stand.finish()
    assert answered(first, second) and stand.worker.computed == 30 + 1 and stand.core.paused_total == 0
