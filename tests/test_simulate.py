"""The simulator: its worlds end, its figures add up, and the cost model follows what was measured."""

import json
from pathlib import Path

import costs as costing
import numpy as np
import pytest
import report
import simulate
import workloads
from costs import Costs, Work
from simulator import DRIFT, TAKE, Agreement, Ask, Device, Uneven, World

from aiollm.engine.integrity import check
from aiollm.engine.ledger import Limits
from aiollm.engine.policy import Aggressive, Conservative, PastFuture
from aiollm.engine.scheduler import Scheduler, Service
from aiollm.fleet.record import FROM_WORKER, TO_WORKER, Recorder
from aiollm.wire.messages import Setup, WorkerSettings, encoder

FLAT = Costs(what="test", floor=10_000.0, token=0.1, power=2.0, kv_token=0.001, pair=0.0)


def asks(count, prompt=50, output=20, cap=40, **fields):
    random = np.random.default_rng(1)
    return [Ask(workloads.prompt_of(random, prompt), output, cap, **fields) for _ in range(count)]


def core_of(policy=None, slots=600, rows=16, **service):
    return Scheduler(Limits(rows, slots, 400, 64, 64), policy or PastFuture(), Service(**service))


@pytest.mark.parametrize("overlap", [1, 2])
def test_everybody_gets_an_output_of_its_length_and_time_passes_by_the_cost_model(overlap):
    world = World(core_of(), asks(12), FLAT, overlap=overlap)
    world.play()
    assert len(world.ended) == 12 and world.core.idle
    assert all(len(client.request.output) == 20 and client.finish.reason == "stop" for client in world.ended)
    assert world.now == pytest.approx(world.busy) and world.now > 20 * 0.01
    assert all(0 < client.arrived + 0.01 <= client.first <= client.last for client in world.ended)
    check(world.core)


def test_requests_that_arrive_later_wait_for_their_time():
    world = World(core_of(), [ask._replace(at=at) for at, ask in enumerate(asks(4))], FLAT)
    world.play()
    assert [round(client.arrived) for client in world.clients] == [0, 1, 2, 3]


def test_closed_loops_ask_again_when_they_were_answered():
    world = World(core_of(), asks(9), FLAT, clients=3)
    world.play(stop=lambda: world.exhausted)
    assert len(world.clients) == 9 and len(world.ended) >= 6


def test_no_two_clients_ask_at_the_same_time_and_whoever_gives_up_asks_again_at_once():
    slow = Costs(what="test", floor=1e6, token=0.1, power=2.0, kv_token=0.0, pair=0.0)
    patient = Agreement(patience=0.3)
    world = World(core_of(Conservative(), slots=100), asks(20, output=39), slow, clients=4, agreement=patient)
    world.play(until=1.0)
    arrivals = [client.arrived for client in world.clients]
    assert arrivals[:4] == pytest.approx([TAKE * at for at in (1, 2, 3, 4)])
    assert arrivals[4:7] == pytest.approx([0.3 + TAKE * at for at in (3, 4, 5)])
    assert len(set(arrivals)) == len(arrivals) > 7


def test_an_uneven_machine_is_slow_for_a_while_and_scatters():
    works = [Work(8, 100, 0, 0)] * 400
    device = Device(core_of(), FLAT, Uneven(drift=[2.0, 0.5], scatter=0.05), seed=3)
    us = FLAT.us(works[0])
    for now, times in ((0.0, 2.0), (DRIFT - 0.1, 2.0), (DRIFT, 0.5), (2 * DRIFT, 1.0)):
        off = np.log([device.duration(work, now) / us for work in works])
        assert np.mean(off) == pytest.approx(np.log(times), abs=0.01)
        assert np.std(off) == pytest.approx(0.05, rel=0.1)


def test_the_unevenness_of_a_run_is_found_in_its_iterations():
    truth = Uneven(drift=[1.5, 1.0, 0.8], scatter=0.02)
    device, now, measured = Device(core_of(), FLAT, truth), 0.0, []
    while now < 3 * DRIFT:
        work = Work(8, len(measured) % 1000, 0, 0)
        measured.append((work, device.duration(work, now), 0.0))
        now += measured[-1][1] * 1e-6
    found = costing.unevenness(FLAT, measured)
    assert found.drift == pytest.approx(truth.drift, rel=0.01)
    assert found.scatter == pytest.approx(truth.scatter, rel=0.1)


def test_clients_that_waited_too_long_go_away():
    world = World(core_of(Conservative(), slots=100), asks(6, output=39), FLAT, agreement=Agreement(patience=0.3))
    world.play()
    lost = [client for client in world.ended if client.finish.reason == "timeout"]
    assert lost and len(lost) < 6 and all(client.first < 0 for client in lost)
    assert not any(Agreement().kept(client) for client in lost)


def test_a_small_pool_pauses_and_everybody_ends():
    world = World(core_of(Aggressive(), slots=200), asks(10, output=39), FLAT)
    world.play()
    assert world.core.paused_total > 0 and len(world.ended) == 10
    assert all(len(client.request.output) == 39 for client in world.ended)
    assert max(world.memory) <= 200 + 10


def test_past_future_pauses_less_than_aggressive_and_ends_before_conservative():
    rows = {
        policy: simulate.artifact("decode-heavy", policy, 60)
        for policy in ("past-future", "aggressive", "conservative")
    }
    assert rows["conservative"]["evicted"] == 0 < rows["past-future"]["evicted"] < rows["aggressive"]["evicted"]
    assert rows["past-future"]["steps"] < 0.75 * rows["conservative"]["steps"]


def test_a_conversation_finds_its_own_past_and_the_system_prompt_in_the_cache():
    setup = simulate.SETUP | {"costs": "qwen3-8b-h100", "warm_up": 0.0, "window": 60.0}
    row = simulate.serve("chats", "past-future", setup)
    assert row["cached"] > 85 and row["lost"] == 0


@pytest.mark.parametrize("workload", ["bursts", "drift", "reasoning", "thinking"])
def test_every_workload_runs(workload):
    setup = simulate.SETUP | {"warm_up": 2.0, "window": 8.0, "clients": 8}
    row = simulate.serve(workload, "past-future", setup)
    assert row["iterations"] > 100 and 0 < row["memory"] <= 100
    assert workload in report.table([row], simulate.SERVE_COLUMNS)


def test_one_key_does_not_take_the_share_of_another():
    """Ten clients of one key beside one of another: both keys get the same where there is not enough."""
    flood = [ask._replace(key="a") for ask in asks(60, output=39)]
    trickle = [ask._replace(key="b", at=0.2 * at) for at, ask in enumerate(asks(10, prompt=51, output=39))]
    world = World(core_of(slots=300, rows=2), [*flood, *trickle], FLAT)
    world.play()
    mean = {key: np.mean([c.first - c.arrived for c in world.ended if c.ask.key == key]) for key in "ab"}
    assert mean["b"] < mean["a"] / 3


def test_a_gap_target_holds_where_whole_chunks_would_not():
    slow = Costs(what="test", floor=10_000.0, token=500.0, power=4.0, kv_token=0.0, pair=0.0)
    longest = {}
    for target in (0.0, 0.1):
        limits = Limits(8, 40_000, 10_000, 2048, 2048)
        core = Scheduler(limits, PastFuture(), Service(gap_target=target))
        first = asks(1, output=600, cap=600)
        prompts = [ask._replace(at=0.2 + 0.5 * at) for at, ask in enumerate(asks(4, prompt=1500, output=2))]
        world = World(core, first + prompts, slow)
        world.play()
        longest[target] = world.clients[0].gap
    assert longest[0.0] > 0.35 and longest[0.1] < 0.75 * longest[0.0]


def test_a_fit_finds_the_model_that_made_the_measurements(tmp_path: Path):
    truth = Costs(what="t", floor=5000.0, token=20.0, power=3.0, kv_token=0.05, pair=0.001)
    steps = []
    for kind, rows, length in [
        ("decode", 1, 300), ("decode", 16, 1000), ("decode", 64, 3000), ("decode", 256, 500), ("decode", 1024, 200),
        ("decode", 512, 100), ("prefill", 1, 8192), ("prefill", 4, 512), ("prefill", 2, 4096), ("prefill", 1, 128),
    ]:  # fmt: skip
        tokens = rows * length
        work = Work(rows, tokens, 0, 0) if kind == "decode" else Work(0, 0, tokens, rows * length * length // 2)
        steps.append({"workload": f"{kind} {rows} x {length}", "graph_us": truth.us(work)})
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"steps": steps}))
    found = costing.fit(costing.iterations(path), "t")
    assert (
        found.error < 0.01
        and found.floor == pytest.approx(5000, rel=0.05)
        and found.token == pytest.approx(20, rel=0.05)
    )
    costing.save(found, tmp_path / "costs.json")
    assert costing.load(str(tmp_path / "costs.json")).kv_token == pytest.approx(0.05, rel=0.05)


def test_the_shipped_cost_model_is_that_of_the_measured_steps():
    costs = costing.load("qwen3-8b-h100")
    for work, us in (
        (Work(64, 20_480, 0, 0), 7186),
        (Work(256, 81_920, 0, 0), 11_701),
        (Work(1024, 196_608, 0, 0), 33_695),
    ):
        assert costs.us(work) == pytest.approx(us, rel=0.05)


def test_a_record_tells_of_the_work_that_was_done(tmp_path: Path):
    """What the fit reads from messages is what the simulated device computed."""
    recorder = Recorder(str(tmp_path / "record"))
    settings = WorkerSettings(folder="", rows=16)
    recorder.keep(TO_WORKER, encoder.encode(Setup(1, settings)))
    world = World(core_of(Aggressive(), slots=200), asks(10, output=39), FLAT)
    send, on_result = world.device.send, world.core.on_result

    def sent(update):
        recorder.keep(TO_WORKER, encoder.encode(update))
        send(update)

    def received(result):
        recorder.keep(FROM_WORKER, encoder.encode(result))
        return on_result(result)

    world.device.send, world.core.on_result = sent, received
    world.play()
    recorder.close()
    works = list(costing.of_record(tmp_path / "record"))
    assert len(works) == world.iterations and world.core.paused_total > 0
    assert sum(work.chunk for work, _, _ in works) == world.device.computed
    assert all(int(FLAT.us(work)) == us for work, us, _ in works)
