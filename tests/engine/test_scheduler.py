import random

import numpy as np
import pytest
from plain_worker import PlainWorker, Sink, Stand, answered, ask, chunks, count_to, reply, sink

from aiollm.engine.pace import PIECE
from aiollm.engine.policy import Aggressive, Conservative, LightLLM, PastFuture
from aiollm.engine.queue import OUTPUT_WEIGHT
from aiollm.engine.request import Finish, State
from aiollm.engine.scheduler import CHUNKS_AHEAD, NEWCOMERS
from aiollm.wire.columns import ints
from aiollm.wire.messages import Failed, Header

# Prefill


def test_chunks_keep_to_the_budget_and_to_the_size_of_one_row():
    stand = Stand(chunk_budget=10, chunk_size=6)
    a, b = ask(count_to(20), 3), ask(count_to(20, 1), 3)
    stand.submit(a, b)
    sizes = []
    while not stand.core.idle:
        update = stand.plan()
        if update is not None and chunks(update):
            sizes.append([count for _, _, count in chunks(update)])
            assert max(sizes[-1]) <= 6 and sum(sizes[-1]) <= 10
        stand.receive()
    assert sizes[0] == [6, 4] and sum(map(sum, sizes)) == 40
    assert answered(a, b)


@pytest.mark.parametrize(("max_tokens", "second"), [(1, 1952), (2, PIECE - 1)])
def test_a_row_that_draws_its_only_token_is_no_stream_that_chunks_give_way_to(max_tokens, second):
    stand = Stand(rows=4, slots=10000, max_length=3000, chunk_budget=2048, chunk_size=2048)
    for namespace in "ab":
        stand.submit(ask(count_to(2000), max_tokens, namespace=namespace))
    sent = [[count for _, _, count in chunks(update)] for update in (stand.plan() for _ in range(2)) if update]
    assert sent == [[2000, 48], [second]]
    stand.finish()


def test_at_most_three_updates_with_chunks_are_outstanding():
    stand = Stand(chunk_budget=5)
    stand.submit(ask(count_to(30), 2))
    sent = [update for update in (stand.plan() for _ in range(6)) if update is not None]
    assert [chunks(update) for update in sent] == [[(0, 0, 5)], [(0, 5, 5)], [(0, 10, 5)]]
    assert stand.core.outstanding_chunks == CHUNKS_AHEAD
    stand.receive()
    update = stand.plan()
    assert update is not None and chunks(update) == [(0, 15, 5)]
    stand.finish()


def test_an_update_lets_so_many_begin_and_the_next_one_the_others():
    crowd = [ask(count_to(3, seed), 2) for seed in range(NEWCOMERS + 5)]
    stand = Stand(rows=len(crowd), slots=1000, chunk_budget=1000)
    stand.submit(*crowd)
    begun = [len(update.admit) for update in (stand.plan() for _ in range(3)) if update is not None]
    assert begun == [NEWCOMERS, 5]
    stand.finish()
    assert answered(*crowd)


def test_choices_of_one_prompt_begin_together_however_many_an_update_lets_begin():
    family, others = [ask(count_to(3), 2) for _ in range(NEWCOMERS)], [ask(count_to(4, 5), 2) for _ in range(2)]
    for request in family[1:]:
        request.prompt = family[0].prompt
    stand = Stand(rows=2 * NEWCOMERS, slots=1000, chunk_budget=1000)
    stand.submit(others[0])
    stand.core.submit(*family)
    stand.submit(others[1])
    begun = [len(update.admit) for update in (stand.plan() for _ in range(3)) if update is not None]
    assert begun == [1 + NEWCOMERS, 1]
    stand.finish()
    assert answered(*family, *others)


def test_the_last_chunk_brings_the_first_credit():
    stand = Stand(slots=40)
    stand.submit(ask(count_to(6), 5))
    update = stand.plan()
    assert update is not None and ints(update.slots.counts).sum() == 8
    stand.receive()
    assert stand.receive() and stand.receive(), "two steps before the server says anything"
    stand.finish()


def test_first_come_is_first_served():
    stand = Stand(rows=2)
    requests = [ask(count_to(5, i), 3, arrived=i) for i in range(6)]
    stand.submit(*requests)
    ended = []
    while not stand.core.idle:
        stand.round()
        ended += [at for at, r in enumerate(requests) if r.state is State.FINISHED and at not in ended]
    assert ended == sorted(ended) and answered(*requests)


def test_a_big_request_is_not_overtaken_by_small_ones():
    stand = Stand(rows=4, slots=40)
    first, big, small = ask(count_to(20), 10), ask(count_to(20, 1), 10), ask([1], 2)
    stand.submit(first, big, small)
    while big.state is State.WAITING:
        stand.round()
        assert small.state is State.WAITING or big.state is State.RUNNING
    stand.finish()
    assert answered(first, big, small)


# Ends


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "slots"), [(1, 1, 1), (1, 2, 2), (1, 20, 20), (20, 1, 20), (12, 9, 20), (19, 2, 20)]
)
def test_a_request_that_just_fits_runs(prompt, max_tokens, slots, prefix_cache):
    stand = Stand(rows=1, slots=slots, max_length=prompt + max_tokens, chunk_budget=4, prefix_cache=prefix_cache)
    for seed in range(3):
        request = ask(count_to(prompt, seed), max_tokens)
        stand.submit(request)
        stand.finish()
        assert answered(request)
    assert stand.core.paused_total == 0


def test_a_request_that_can_never_run_is_refused_with_all_that_came_with_it():
    stand = Stand(slots=20, max_length=30)
    assert stand.core.fits(10, 11) and not stand.core.fits(10, 12) and not stand.core.fits(31, 0)
    for wrong in (ask(count_to(10), 12), ask([], 2), ask([1], 0)):
        with pytest.raises(ValueError, match="can never run"):
            stand.core.submit(ask([1], 2), wrong)
        assert not stand.core.waiting


def test_a_stop_id_ends_a_request_unless_it_is_too_young():
    prompt = count_to(6)
    expected = reply(prompt, 12)
    stop = expected[2]
    at = [i for i, token in enumerate(expected) if token == stop]
    for min_tokens, end in ((0, at[0]), (at[0], at[0])):
        stand = Stand()
        request = ask(prompt, 12, stop_ids=(stop,), min_tokens=min_tokens)
        stand.submit(request)
        stand.finish()
        assert sink(request).ids == expected[: end + 1] and sink(request).finish == Finish("stop", stop)
    stand = Stand()
    request = ask(prompt, at[0] + 1, stop_ids=(stop,), min_tokens=at[0] + 1)
    stand.submit(request)
    stand.finish()
    assert sink(request).finish == Finish("length")


def test_a_stop_string_ends_a_request_that_the_worker_goes_on_with():
    stand = Stand()
    request, other = ask(count_to(6), 12), ask(count_to(6, 1), 12)
    seen = sink(request)
    request.sink.token = lambda token: seen.tokens.append(token) or ("END" if len(seen.tokens) == 3 else None)
    stand.submit(request, other)
    stand.finish()
    assert seen.finish == Finish("stop", "END") and len(seen.ids) == 3
    assert answered(other)


@pytest.mark.parametrize("when", ["token", "prompt_tokens", "finished"])
def test_an_output_that_cannot_be_written_harms_nobody_else(when):
    class Broken(Sink):
        pass

    def fail(self, _):
        raise OSError("gone")

    setattr(Broken, when, fail)
    stand = Stand(rows=3)
    before, bad, after = (ask(count_to(9, i), 5, prompt_logprobs=0) for i in range(3))
    bad.sink = Broken()
    stand.submit(before, bad, after)
    stand.finish()
    assert answered(before, after) and bad.state is State.FINISHED


@pytest.mark.parametrize("stage", ["waiting", "admitted", "prefilling", "decoding", "finished"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_request_can_be_aborted_at_any_stage(stage, prefix_cache):
    stand = Stand(rows=2, chunk_budget=5, prefix_cache=prefix_cache)
    other, request = ask(count_to(8, 3), 6), ask(count_to(12), 6)
    stand.submit(other, request)
    reached = {
        "waiting": lambda: True,
        "admitted": lambda: request.state is State.RUNNING,
        "prefilling": lambda: stand.worker.computed > 9,
        "decoding": lambda: len(request.output) == 2,
        "finished": lambda: request.state is State.FINISHED,
    }[stage]
    while not reached():
        stand.plan()
        if not reached():
            stand.receive()
    stand.core.abort(request)
    stand.core.abort(request)
    assert request.state is State.FINISHED
    assert sink(request).finish == Finish("length" if stage == "finished" else "abort")
    stand.finish()
    assert answered(other)
    assert len(stand.core.ledger.free_rows) == 2


# Pauses


def test_a_paused_request_goes_on_where_it_was():
    for at in range(1, 12):
        stand = Stand(rows=2, chunk_budget=6)
        request, other = ask(count_to(10), 8, arrived=0), ask(count_to(10, 1), 8, arrived=1)
        stand.submit(request, other)
        for _ in range(at):
            stand.round()
        if request.state is State.RUNNING:
            stand.core.pause(request)
            assert request.state is State.WAITING and stand.core.waiting.head(0.0) is request
        stand.finish()
        assert answered(request, other)


def test_a_paused_request_waits_before_those_that_came_later():
    stand = Stand(rows=2)
    requests = [ask(count_to(4, i), 6, arrived=i) for i in range(5)]
    stand.submit(*requests)
    stand.round()
    stand.core.pause(requests[1])
    stand.core.pause(requests[0])
    assert list(stand.core.waiting) == requests
    stand.finish()
    assert answered(*requests)


def test_requests_that_came_at_once_keep_their_order_through_pauses():
    stand = Stand(rows=3)
    requests = [ask(count_to(4, i), 6) for i in range(5)]
    stand.submit(*requests)
    stand.round()
    for request in requests[2::-1]:
        stand.core.pause(request)
    assert list(stand.core.waiting) == requests


def test_rows_that_do_not_fit_later_are_paused_and_come_back():
    stand = Stand(rows=6, slots=40, policy=Aggressive())
    requests = [ask(count_to(5, i), 20, arrived=i) for i in range(6)]
    stand.submit(*requests)
    stand.finish()
    assert answered(*requests)
    assert 0 < stand.core.paused_total < 20 and requests[0].pauses == 0


def test_the_oldest_row_takes_a_step_when_a_younger_prompt_is_still_coming_in():
    stand = Stand(rows=3, slots=54, chunk_budget=2, chunk_size=1, policy=Aggressive())
    first, second, third = ask(count_to(30), 5, 0.0), ask(count_to(3, 1), 24, 1.0), ask(count_to(18, 2), 5, 2.0)
    stand.submit(first, second, third)
    while third.pauses == 0:
        stand.round()
        assert not first.output
    stand.finish()
    assert answered(first, second, third) and first.pauses == 0


@pytest.mark.parametrize("slots", [36, 37])
def test_credit_that_was_drafted_for_a_row_goes_with_its_pause(slots):
    """A prompt comes in slowly beside a row whose output grows, until one of them takes the last slot."""
    stand = Stand(rows=2, slots=slots, chunk_budget=2, chunk_size=1, policy=Aggressive())
    first, second = ask(count_to(30), 5, 0.0), ask(count_to(3, 1), 30, 1.0)
    stand.submit(first, second)
    while second.pauses == 0:
        stand.round()
        assert not first.output
    stand.finish()
    assert answered(first, second)


@pytest.mark.parametrize("prompts", [(20, 15, 14), (20, 11, 10, 9)])
def test_the_oldest_prompt_gets_its_memory_from_those_that_came_later(prompts):
    """A loan holds what these prompts were to use."""
    stand = Stand(rows=4, slots=60, chunk_budget=4 * len(prompts), chunk_size=4)
    stand.submit(ask(count_to(29, 5), 1))
    stand.finish()
    requests = [ask(count_to(size, at), 3, float(at)) for at, size in enumerate(prompts)]
    stand.submit(*requests)
    stand.round()
    loan = stand.core.ledger.lend("", np.array(count_to(29, 5), np.int64))
    assert loan.slots.shape == (1, 29) and len(stand.core.ledger.running) == len(prompts)
    stand.finish()
    assert answered(*requests) and requests[0].pauses == 0 and requests[-1].pauses > 0
    stand.core.ledger.settle(loan)


def test_worst_case_admission_needs_no_pause_where_all_rows_run_in_step():
    """The prompts share a prefix, so whoever computed it must not seem to take it along."""
    for seed in range(30):
        rng = random.Random(seed)
        stand = Stand(rows=8, slots=rng.choice([60, 90]), chunk_budget=500, chunk_size=500)
        system = count_to(rng.randint(5, 25))
        requests = [ask([*system, at], rng.randint(1, 30), arrived=at) for at in range(12)]
        stand.submit(*requests)
        stand.finish()
        assert stand.core.paused_total == 0 and answered(*requests)


# Faults


def test_a_failed_iteration_fails_its_rows_and_nobody_else():
    stand = Stand(rows=2, chunk_budget=64, chunk_size=64)
    failing, next_one = ask(count_to(10), 4), ask([*count_to(10), 1, 2], 4)
    stand.submit(failing)
    stand.plan()
    stand.submit(next_one)
    stand.plan()  # matches what the first one's chunk will store
    stand.worker.fails = True
    stand.receive()
    assert sink(failing).finish == Finish("error", error="boom")
    assert next_one.state is State.WAITING, "it stood on garbage"
    assert stand.core.ledger.index.total == 0
    stand.finish()
    assert answered(next_one) and next_one.pauses == 0


def test_a_failed_chunk_spoils_only_what_it_was_to_compute():
    stand = Stand(rows=1, chunk_budget=6)
    stand.submit(ask(count_to(12), 4))
    stand.round()
    stand.plan()
    stand.worker.fails = True
    stand.receive()
    assert stand.core.ledger.index.total == 6
    again = ask(count_to(12), 4)
    stand.submit(again)
    stand.finish()
    assert again.cached_tokens == 6 and answered(again)


def test_a_failure_of_rows_that_were_retired_meanwhile_poisons_all_the_same():
    stand = Stand(rows=2, chunk_budget=64)
    request = ask(count_to(10), 4)
    stand.submit(request)
    stand.plan()
    stand.core.abort(request)
    reader = ask([*count_to(10), 3], 4)
    stand.submit(reader)
    stand.plan()
    assert reader.cached_tokens == 10
    stand.worker.fails = True
    stand.receive()
    stand.finish()
    assert sink(request).finish == Finish("abort") and answered(reader)


def test_a_failed_decode_step_fails_the_rows_that_decoded():
    stand = Stand(rows=2)
    request, waiting = ask(count_to(6), 8), ask(count_to(6, 1), 8)
    stand.submit(request)
    stand.round()
    stand.plan()
    stand.worker.fails = True
    stand.receive()
    stand.submit(waiting)
    stand.finish()
    assert sink(request).finish == Finish("error", error="boom") and answered(waiting)


def test_a_lost_worker_costs_a_request_nothing_once():
    stand = Stand(rows=3, chunk_budget=6)
    requests = [ask(count_to(8, i), 8) for i in range(5)]
    stand.submit(*requests)
    for _ in range(5):
        stand.round()
    assert any(request.output for request in requests)
    assert stand.die() == [] and stand.core.epoch == 2 and list(stand.core.waiting) == requests
    stand.finish()
    assert answered(*requests)


def test_a_second_death_fails_those_that_ran_and_no_others():
    stand = Stand(rows=2, chunk_budget=20)
    requests = [ask(count_to(8, i), 30, arrived=i) for i in range(3)]
    stand.submit(*requests)
    stand.round()
    assert stand.die() == []
    stand.round()
    stand.round()
    lost = stand.die()
    assert lost == requests[:2]
    assert all(sink(request).finish.reason == "error" and "twice" in sink(request).finish.error for request in lost)
    stand.finish()
    assert answered(requests[2])


def test_whoever_hears_of_a_lost_request_may_abort_its_siblings():
    stand = Stand(rows=3, slots=200, chunk_budget=30)
    requests = [ask(count_to(8, i), 30, arrived=i) for i in range(3)]

    class Family(Sink):
        def finished(self, finish):
            super().finished(finish)
            for request in requests:
                if request.state is not State.FINISHED:
                    stand.core.abort(request)

    requests[0].sink = Family()
    stand.submit(*requests[:2])
    stand.round()
    stand.die()
    stand.submit(requests[2])
    stand.round()
    assert len(stand.core.ledger.running) == 3
    stand.die()
    assert [request.sink.finish.reason for request in requests] == ["error", "abort", "abort"]
    assert stand.core.idle


def test_results_of_a_worker_that_died_are_not_heard():
    stand = Stand()
    request = ask(count_to(8), 8)
    stand.submit(request)
    stand.plan()
    late = stand.worker.step()
    stand.worker.fails = True
    stand.plan()
    late_failure = stand.worker.step()
    assert isinstance(late_failure, Failed)
    stand.die()
    stand.plan()
    assert stand.core.on_result(late) == 0 and request.output == []
    stand.core.on_failed(late_failure)
    assert request.state is State.RUNNING and stand.core.outstanding_chunks == 1
    stand.finish()
    assert answered(request)


def test_prompt_and_output_tokens_are_counted_for_whom_they_are():
    """Otherwise long prompts would cost a key nothing, and its lane would always be next."""
    stand = Stand(chunk_budget=6)
    request = ask(count_to(10), 3)
    stand.submit(request)
    stand.finish()
    served = stand.core.waiting.served[stand.core.waiting.lane(request)]
    assert served == 10 + 3 * OUTPUT_WEIGHT


# Everything at once


@pytest.mark.parametrize("policy", [Conservative, Aggressive, PastFuture, LightLLM])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_random_worlds_answer_every_request_exactly(policy, prefix_cache):
    for seed in range(8):
        rng = random.Random(seed)
        stand = Stand(
            rows=rng.choice([1, 3, 8]), slots=rng.choice([30, 60, 120]), max_length=31,
            chunk_budget=rng.choice([4, 8, 32]), chunk_size=rng.choice([3, 32]), prefix_cache=prefix_cache,
            policy=policy(),
        )  # fmt: skip
        stand.core.credit.step_seconds = rng.choice([0.001, 0.1])
        systems = [count_to(rng.randint(1, 12), i) for i in range(3)]
        requests = []
        for at in range(20):
            prompt = [*rng.choice(systems), *(rng.randrange(3) for _ in range(rng.randint(0, 6)))]
            wants = 0 if rng.random() < 0.1 else -1
            requests.append(ask(prompt, rng.randint(1, 31 - len(prompt)), float(at), prompt_logprobs=wants))
        todo = [*requests]
        while todo:
            if rng.random() < 0.4:
                stand.submit(todo.pop(0))
            (stand.plan, stand.receive)[rng.random() < 0.5]()
            running = [request for request in requests if request.state is State.RUNNING]
            if running and rng.random() < 0.05:
                stand.core.pause(rng.choice(running))
        stand.finish()
        assert answered(*requests)


def test_a_header_alone_moves_the_clock():
    stand = Stand()
    assert stand.core.on_header(Header(1, 1, 1, 7, 1000, 0, b"")) and stand.core.ledger.applied == 7
    assert not stand.core.on_header(Header(0, 1, 1, 9, 1000, 0, b"")) and stand.core.ledger.applied == 7
    assert isinstance(stand.worker, PlainWorker)
