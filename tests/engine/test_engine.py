import asyncio
import functools
import random
import time

import msgspec
import pytest
from plain_worker import PlainWorker, ask, reply, sink

from aiollm.engine.engine import QUEUED_POOLS, Engine, EngineBusy, Settings
from aiollm.engine.policy import Aggressive, Conservative, PastFuture
from aiollm.engine.request import Finish, State
from aiollm.engine.scheduler import DEFAULT, Service
from aiollm.engine.share import Shares
from aiollm.engine.window import Window
from aiollm.wire.columns import ints
from aiollm.wire.messages import Failed, Loading, Ready

READY = Ready(
    slots=400, max_length=64, vocabulary=50, architecture="plain", data_type="int64", budget=[], seconds=[]
)  # fmt: skip


def in_a_loop(test):
    """Run a test with an event loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


class Group:
    """What a fleet does for the engine, with a worker that iterates when told."""

    def __init__(self, engine, ready=READY):
        self.engine = engine
        self.updates = []
        self.freed = []
        self.start(ready)

    def start(self, ready=READY):
        epoch = self.engine.on_ready(ready, self)
        self.worker = PlainWorker(self.engine.core)
        return epoch

    def send(self, update):
        self.updates.append(update)
        self.worker.queue.append(update)

    def applied(self, number):
        self.freed.append(number)

    def iterate(self):
        """One iteration and its message; False where there was nothing to do."""
        message = self.worker.step()
        if message is not None:
            self.engine.on_message(message)
        self.engine.check_integrity()
        return message is not None

    async def serve(self):
        """Iterate until the worker has nothing to do and nothing is on its way to it."""
        await turns()
        while self.iterate():
            await turns()


async def turns():
    """Let whatever the engine has asked the loop for happen."""
    for _ in range(4):
        await asyncio.sleep(0)


def make(queue=10, chunk_budget=16, rows=4, policy=None, queue_tokens=100_000, key_share=1.0, service=DEFAULT):
    policy = policy or Conservative()
    return Engine(
        Settings(rows, chunk_budget, chunk_budget, True, policy, queue, queue_tokens, key_share, service)
    )  # fmt: skip


def start(ready=READY, **settings):
    engine = make(**settings)
    return engine, Group(engine, ready)


def answered(request):
    return sink(request).ids == reply(request.prompt.tolist(), request.sampling.max_tokens)


@in_a_loop
async def test_nothing_is_taken_before_the_model_is_loaded():
    engine = make()
    assert engine.status == ("loading", "starting", 0.0, "")
    engine.on_loading(Loading("weights", 0.25))
    assert engine.status == ("loading", "weights", 0.25, "")
    with pytest.raises(EngineBusy, match="loading: weights 25%") as busy:
        _ = engine.limits
    assert busy.value.reason == "loading"
    with pytest.raises(EngineBusy) as busy:
        engine.submit(ask([1]))
    assert busy.value.reason == "loading"
    engine.abort(ask([1]))
    engine.check_integrity()
    await engine.drain(5)
    with pytest.raises(EngineBusy) as busy:
        engine.submit(ask([1]))
    assert busy.value.reason == "draining"


@in_a_loop
async def test_sizes_come_from_the_workers_and_the_settings():
    engine, _ = start()
    assert engine.status == ("ready", "ready", 1.0, "") and engine.ready is READY
    assert engine.limits == (4, 400, 64, 16, 16, True, Window())


@in_a_loop
async def test_a_pool_holds_longer_requests_where_layers_have_a_window():
    ready = msgspec.structs.replace(READY, max_length=2000, window=9, windowed=3)
    engine, _ = start(ready)
    limits = engine.limits
    assert (limits.slots, limits.window) == (1600, Window(9, 3))
    assert limits.longest == 1600 - 3 * (9 + 16) + 1, "the last token needs no slot; a chunk is guarded as a whole"
    assert limits.room == limits.longest - 1


@in_a_loop
async def test_a_prompt_may_fill_the_context_where_the_pool_has_the_room():
    engine, _ = start()
    assert (engine.limits.longest, engine.limits.room) == (64, 64)
    small, _ = start(msgspec.structs.replace(READY, slots=40))
    assert (small.limits.longest, small.limits.room) == (41, 40)


@in_a_loop
async def test_requests_are_answered():
    engine, group = start()
    headers = []
    engine.on_header = lambda header, tokens: headers.append((header.iteration, tokens))
    requests = [ask([1, 2, i], 5) for i in range(6)]
    engine.submit(*requests)
    await group.serve()
    assert all(map(answered, requests))
    assert [at for at, _ in headers] == list(range(1, len(headers) + 1))
    assert sum(tokens for _, tokens in headers) == 30
    assert group.freed == sorted(group.freed) and group.freed[-1] > 1


@in_a_loop
async def test_what_happens_in_one_turn_of_the_loop_is_planned_once():
    engine, group = start(chunk_budget=64)
    for i in range(4):
        engine.submit(ask([1, 2, i], 5))
    gone = ask([3], 5)
    engine.submit(gone)
    engine.abort(gone)
    assert group.updates == []
    await turns()
    (update,) = group.updates
    assert len(update.admit) == 4


@in_a_loop
async def test_the_chunks_after_these_are_sent_before_these_are_done():
    engine, group = start(chunk_budget=10)
    engine.submit(ask(list(range(35)), 2))
    await turns()
    assert [ints(update.chunk_starts).tolist() for update in group.updates] == [[0], [10], [20]]
    group.iterate()
    await turns()
    assert [ints(update.chunk_starts).tolist() for update in group.updates] == [[0], [10], [20], [30]]
    await group.serve()


@in_a_loop
async def test_too_many_tokens_in_the_queue_are_refused():
    engine, group = start(queue_tokens=50, rows=1)
    engine.submit(ask([1] * 20, 40))
    await turns()
    engine.submit(ask([2] * 60))  # nobody waits: it may be as long as it likes
    with pytest.raises(EngineBusy, match="requests of 60 tokens are waiting, --max_queue_tokens is 50") as busy:
        engine.submit(ask([3]))
    assert busy.value.reason == "queue_full" and busy.value.retry_after >= 1
    await group.serve()


@in_a_loop
async def test_who_asks_before_any_work_hears_what_submit_would_say():
    engine, group = start(queue=1, rows=1)
    engine.submit(ask([1], 30))
    await turns()
    engine.check_room("")
    engine.submit(ask([2]))
    with pytest.raises(EngineBusy, match="1 requests are waiting, --max_queue is 1"):
        engine.check_room("")
    engine.hold()
    with pytest.raises(EngineBusy, match="the server is draining"):
        engine.check_room("")
    engine.resume()
    await group.serve()
    engine.check_room("")


@in_a_loop
async def test_the_tokens_that_may_wait_are_some_pools_unless_told():
    engine, _ = start(queue_tokens=0, queue=1000, rows=1)
    slots = READY.slots
    engine.submit(ask([1] * 20, 40))
    await turns()
    engine.submit(*(ask([2] * 10) for _ in range(QUEUED_POOLS * slots // 10)))
    with pytest.raises(EngineBusy, match=f"max_queue_tokens is {QUEUED_POOLS * slots}"):
        engine.submit(ask([3]))
    engine.on_stopped("over")


@in_a_loop
async def test_one_key_gets_its_share_of_the_queue_and_the_others_theirs():
    engine, group = start(queue=6, key_share=0.5, rows=1)

    def of(key):
        request = ask([1], 30)
        request.key = key
        return request

    engine.submit(of("a"))
    await turns()
    engine.submit(*(of("a") for _ in range(3)))
    with pytest.raises(EngineBusy, match="3 requests of this API key are waiting, and 3 may") as busy:
        engine.submit(of("a"))
    assert busy.value.reason == "rate_limit_exceeded"
    engine.submit(of("b"), of("b"), of("b"))
    with pytest.raises(EngineBusy, match="6 requests are waiting") as busy:
        engine.submit(of("c"))
    assert busy.value.reason == "queue_full"
    await group.serve()


@in_a_loop
async def test_other_shares_hold_from_now_on_and_for_the_model_that_loads():
    engine, fresh = start(key_share=0.5)[0], make()
    for each in (engine, fresh):
        each.share(0.25, Shares(0.5, {"a": 0.1}))
    fresh.on_ready(READY, None)
    for each in (engine, fresh):
        assert each.settings.key_share == 0.25
        parts = [each.core.ledger.index.queues.part(name) for name in ("a", "b")]
        assert [part.share for part in parts] == [0.1, 0.5]


@in_a_loop
async def test_a_request_that_waited_too_long_is_given_up_without_any_other_event():
    engine, _ = start(rows=1, service=Service(queue_timeout=0.5))
    running, waiting = (ask([at], 30, arrived=time.monotonic()) for at in range(2))
    engine.submit(running, waiting)
    await turns()
    assert waiting.state is State.WAITING
    async with asyncio.timeout(5):
        while waiting.state is State.WAITING:
            await asyncio.sleep(0.01)
    assert sink(waiting).finish.reason == "timeout" and running.state is State.RUNNING
    assert "did not begin" in sink(waiting).finish.error


@in_a_loop
async def test_a_client_may_wait_for_less_than_the_server_lets_it():
    engine, group = start(rows=1, service=Service(queue_timeout=600.0))
    running, waiting = (ask([at], 30, arrived=time.monotonic()) for at in range(2))
    waiting.patience = 0.05
    engine.submit(running, waiting)
    async with asyncio.timeout(5):
        while waiting.state is not State.FINISHED:
            await asyncio.sleep(0.01)
    assert sink(waiting).finish.reason == "timeout"
    await group.serve()
    assert answered(running)


@in_a_loop
async def test_the_cost_of_thinking_is_told_for_each_iteration():
    engine, group = start()
    told = []
    engine.on_cost = lambda scheduler, index: told.append((scheduler, index))
    engine.submit(ask([1, 2, 3], 5))
    await group.serve()
    assert len(told) == engine.signs
    assert all(0 < index < scheduler for scheduler, index in told[:1])
    assert all(0 <= index <= scheduler for scheduler, index in told)


@in_a_loop
async def test_a_full_queue_is_refused():
    engine, group = start(queue=2)
    engine.submit(*(ask([i], 40) for i in range(4)))
    await turns()
    engine.submit(ask([8]), ask([9]))
    with pytest.raises(EngineBusy, match="2 requests are waiting, --max_queue is 2") as busy:
        engine.submit(ask([10]))
    assert busy.value.reason == "queue_full"
    await group.serve()
    engine.submit(ask([10]))
    await group.serve()


@in_a_loop
async def test_a_batch_that_is_longer_than_the_queue_runs_when_nobody_waits():
    engine, group = start(queue=2)
    batch = [ask([i], 3) for i in range(9)]
    engine.submit(*batch)
    with pytest.raises(EngineBusy):
        engine.submit(ask([9]))
    await group.serve()
    assert all(map(answered, batch))


@in_a_loop
async def test_of_requests_that_come_together_all_are_taken_or_none():
    engine, group = start()
    good, bad = ask([1], 3), ask([1], 3000)
    with pytest.raises(ValueError, match="can never run"):
        engine.submit(good, bad)
    await turns()
    assert group.updates == [] and engine.core.idle
    await engine.drain(5)


@in_a_loop
async def test_an_abort_frees_the_row_for_the_next_one():
    engine, group = start()
    long = [ask([i], 40) for i in range(4)]
    engine.submit(*long)
    await turns()
    engine.submit(next_one := ask([9], 3))
    await turns()
    assert next_one.state is State.WAITING
    engine.abort(long[2])
    assert sink(long[2]).finish == Finish("abort")
    await turns()
    assert next_one.state is State.RUNNING
    await group.serve()


@in_a_loop
async def test_a_drain_lets_run_what_runs_and_refuses_the_rest():
    engine, group = start()
    running, waiting = [ask([i], 6) for i in range(4)], ask([9], 6)
    engine.submit(*running, waiting)
    draining = asyncio.create_task(engine.drain(60))
    await turns()
    assert engine.status.state == "draining" and not draining.done()
    with pytest.raises(EngineBusy) as busy:
        engine.submit(ask([1]))
    assert busy.value.reason == "draining"
    await group.serve()
    await draining
    assert all(map(answered, [*running, waiting]))


@in_a_loop
async def test_a_drain_aborts_what_is_left_when_time_is_up():
    engine, group = start()
    requests = [ask([i], 40) for i in range(6)]
    engine.submit(*requests)
    await turns()
    group.iterate()
    await engine.drain(0)
    assert {sink(request).finish for request in requests} == {Finish("error", error="the server is shutting down")}
    await turns()
    assert len(ints(group.updates[-1].retire)) == 4, "the workers hear of it"
    assert engine.core.idle


@in_a_loop
async def test_requests_outlive_the_worker():
    engine, group = start()
    requests = [ask([1, i], 10) for i in range(6)]
    engine.submit(*requests)
    await turns()
    group.iterate()
    late = group.worker.step()
    engine.on_death()
    assert engine.status == ("loading", "restarting the worker", 0.0, "")
    engine.submit(during := ask([7], 4))
    await turns()
    heard = len(group.freed)
    engine.on_message(late)
    assert len(group.freed) == heard
    assert group.start() == 2
    assert engine.status.state == "ready"
    engine.on_message(late)
    assert len(group.freed) == heard, "a number of the worker that died frees nothing of this one"
    await group.serve()
    assert all(map(answered, [*requests, during]))


@in_a_loop
async def test_a_server_that_drains_still_waits_for_its_worker_to_come_back():
    engine, group = start()
    engine.submit(request := ask([1], 6))
    await turns()
    draining = asyncio.create_task(engine.drain(60))
    await turns()
    engine.on_death()
    assert engine.status.state == "draining"
    group.start()
    assert engine.status.state == "draining"
    await group.serve()
    await draining
    assert answered(request)


@in_a_loop
async def test_when_no_worker_comes_back_everything_ends_with_the_reason():
    engine, _ = start()
    requests = [ask([i], 40) for i in range(6)]
    engine.submit(*requests)
    await turns()
    draining = asyncio.create_task(engine.drain(60))
    await turns()
    engine.on_death()
    engine.on_stopped("out of memory")
    await draining
    assert {sink(request).finish for request in requests} == {Finish("error", error="out of memory")}
    assert engine.status == ("stopped", "ready", 1.0, "out of memory")
    with pytest.raises(EngineBusy, match="out of memory") as busy:
        engine.submit(ask([1]))
    assert busy.value.reason == "stopped"


@in_a_loop
async def test_a_model_that_never_loads_stops_with_the_reason():
    engine = make()
    engine.on_death()
    engine.on_stopped("no such folder")
    with pytest.raises(EngineBusy, match="no such folder"):
        _ = engine.limits
    await engine.drain(60)


@in_a_loop
async def test_a_failed_iteration_is_told_and_the_engine_goes_on(caplog):
    engine, group = start()
    engine.submit(request := ask([1, 2, 3], 6))
    await turns()
    group.worker.fails = True
    group.iterate()
    assert sink(request).finish == Finish("error", error="boom") and "boom" in caplog.text
    await turns()
    assert len(ints(group.updates[-1].retire)) == 1
    engine.submit(again := ask([1, 2, 3], 6))
    await group.serve()
    assert answered(again)


@pytest.mark.parametrize("seed", range(30))
@in_a_loop
async def test_no_request_waits_for_an_event_that_does_not_come(seed):
    """The engine plans on events only: results, submits, aborts. Memory is short, and iterations fail."""
    rng = random.Random(seed)
    ready = msgspec.structs.replace(READY, slots=rng.choice([30, 45, 70]), max_length=31)
    engine, group = start(
        ready, queue=100, chunk_budget=rng.choice([4, 9, 40]), rows=rng.choice([1, 2, 5]),
        policy=rng.choice([Conservative, Aggressive, PastFuture])(),
    )  # fmt: skip
    system, requests = [rng.randrange(50) for _ in range(10)], []
    for _ in range(25):
        prompt = [*system[: rng.randint(0, 10)], *(rng.randrange(50) for _ in range(rng.randint(1, 9)))]
        requests.append(ask(prompt, rng.randint(1, 31 - len(prompt)), arrived=rng.random()))
    for request in requests:
        engine.submit(request)
        if rng.random() < 0.2:
            engine.abort(rng.choice(requests[: requests.index(request) + 1]))
        if rng.random() < 0.05:
            engine.on_death()
            group.start(ready)
        group.worker.fails = rng.random() < 0.05
        for _ in range(rng.randint(0, 5)):
            group.iterate()
            if rng.random() < 0.7:
                await turns()
    group.worker.fails = False
    await group.serve()
    assert engine.core.idle, "the worker has nothing to do, and yet requests are left"
    for request in requests:
        finish = sink(request).finish
        assert finish is not None
        assert finish.reason in ("abort", "error") or answered(request)


@in_a_loop
async def test_messages_that_are_no_results_are_not_for_the_core():
    engine, group = start()
    engine.on_message(READY)
    engine.on_message(Loading("weights", 0.5))
    make().on_message(Failed(header=None, rows=b"", generations=b"", starts=b"", counts=b"", error=""))
    await turns()
    assert group.updates == [] and engine.core.idle
