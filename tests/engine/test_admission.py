import random
from collections import Counter

import numpy as np
import pytest
from foreseen import new, view
from plain_worker import Stand, ask

from aiollm.engine.admission import Foresight, Peaks, Sums, peak
from aiollm.engine.outlook import newcomers
from aiollm.engine.policy import Conservative


def simulate(held, remaining):
    """Every row alive takes one more slot per step, and leaves when it has taken all of its own."""
    rows, most = [[a, b] for a, b in zip(held, remaining, strict=True)], 0
    while rows:
        most = max(most, sum(a for a, _ in rows))
        rows = [[a + 1, b - 1] for a, b in rows if b]
    return most


def random_rows(rng, count):
    held = [rng.randint(0, 20) for _ in range(count)]
    steps = [rng.choice([0, rng.randint(0, 5), rng.randint(0, 30)]) for _ in range(count)]
    return held, steps


def test_peak_is_that_of_rows_that_grow_in_step():
    rng = random.Random(0)
    for _ in range(2000):
        held, steps = random_rows(rng, rng.randint(0, 6))
        assert peak(np.array(held, np.int64), np.array(steps, np.int64)) == simulate(held, steps)


def test_rows_that_join_one_by_one_give_the_peak_of_all():
    rng = random.Random(1)
    for _ in range(500):
        held, steps = random_rows(rng, rng.randint(0, 5))
        draws = [steps, [rng.randint(0, 30) for _ in steps]]
        peaks = Peaks(np.array(held, np.int64), np.array(draws, np.int64))
        for _ in range(4):
            held.append(rng.randint(0, 20))
            new = [rng.randint(0, 30), rng.randint(0, 30)]
            draws = [[*draw, step] for draw, step in zip(draws, new, strict=True)]
            own = np.full(2, held[-1])
            least = peaks.worst_with(own, np.array(new))
            peaks = peaks.with_one(own, np.array(new))
            assert peaks.worst() == least
            assert peaks.worst() == max(simulate(held, draw) for draw in draws)


def test_what_two_rows_share_from_now_on_does_not_go_with_the_first():
    """Told of in any order of sharing and joining."""
    rng = random.Random(2)
    for _ in range(500):
        held, steps = random_rows(rng, 4)
        peaks, shared = Peaks(np.array(held, np.int64), np.array([steps], np.int64)), 0
        for _ in range(4):
            if rng.random() < 0.5:
                place = rng.randrange(len(held))
                slots = rng.randint(0, held[place])
                held[place] -= slots
                shared += slots
                peaks.share(place, slots)
            else:
                held.append(rng.randint(0, 20))
                steps.append(rng.randint(0, 30))
                peaks = peaks.with_one(np.array(held[-1:]), np.array(steps[-1:]))
            if any(steps):
                assert peaks.worst() == shared + simulate(held, steps)


def test_sums_take_what_fits_and_leave_what_does_not():
    sums = Sums(10, 20, lambda newcomer: newcomer.held)
    assert sums.join([new(6, 1)]) and not sums.join([new(5, 1)]) and sums.join([new(2, 1), new(2, 1)])
    assert not sums.join([new(1, 1)]), "both of the two count"


def foresight(seen, reserve=0.0):
    return Foresight(seen, seen.cap[None], reserve, lambda newcomer: np.array([newcomer.cap]))


def test_a_newcomer_that_fits_at_the_worst_moment_joins():
    seen = view(held=[40], done=[0], cap=[21])
    assert foresight(seen).join([new(20, 21)]), "40 + 20 + 2 * 20 = 100"
    assert not foresight(seen).join([new(21, 21)])
    assert foresight(seen).join([new(39, 2)]), "its short life is over when the other one has grown"


def test_the_reserve_is_for_what_is_guessed_alone():
    assert not foresight(view(held=[40], done=[0], cap=[21]), 0.1).join([new(20, 21)])
    assert foresight(view(held=[40], done=[0], cap=[21], certain=[True]), 0.1).join([new(20, 21, certain=True)])
    half = view(held=[40], done=[0], cap=[21], certain=[True])
    assert not foresight(half, 0.1).join([new(20, 21)])
    assert foresight(half, 0.1).join([new(15, 21)]), "35 of 95 are guessed: 3.7 of 100 stay free"


def test_what_is_used_now_counts_even_if_it_will_shrink():
    seen = view(held=[40], done=[0], cap=[1])._replace(used=95)
    assert not foresight(seen).join([new(6, 1)]) and foresight(seen).join([new(5, 1)])


def test_a_prompt_on_its_way_delays_its_row():
    """In step both would end with 30 + 30 + 2 * 19; the second one only begins when the first has ended."""
    seen = view(held=[30], done=[0], cap=[20])
    assert not foresight(seen._replace(slots=97)).join([new(30, 20)])
    assert foresight(seen._replace(slots=90)).join([new(30, 20, delay=19)])


def test_choices_of_one_prompt_count_it_once():
    assert foresight(view(slots=60)).join([new(1, 5, shared=43), new(1, 5), new(1, 5)]), "43 + 3 * 5"
    assert not foresight(view(slots=57)).join([new(1, 5, shared=43), new(1, 5), new(1, 5)])


def by_slot(core, requests, cached_slots):
    """The peak with `requests`, counted slot by slot: what one row alone uses goes with it, the rest stays."""
    running = list(core.ledger.running.values())
    rows = [row.slots[0, : row.granted].tolist() for row in running] + [cached_slots for _ in requests]
    users = Counter(slot for slots in rows for slot in slots)
    everybody = [row.request for row in running] + requests
    held = [
        sum(users[slot] == 1 for slot in slots) + request.known - len(slots)
        for slots, request in zip(rows, everybody, strict=True)
    ]
    if requests:
        held[-1] = requests[-1].known - sum(users[slot] > 1 for slot in cached_slots)
    shared = sum(count > 1 for count in users.values())
    return shared + simulate(held, [max(0, r.limit - 1 - r.known) for r in everybody])


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_what_rows_share_counts_once_and_what_they_own_until_they_end(prefix_cache):
    rng, shared = random.Random(1), 0
    for _ in range(25):
        stand = Stand(rows=6, slots=80, chunk_budget=500, chunk_size=500, prefix_cache=prefix_cache)
        systems = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(2)]

        def prompt(rng=rng, systems=systems):
            return [*rng.choice(systems), *(rng.randrange(50) for _ in range(rng.randint(1, 5)))]

        for at in range(40):
            if at % 3 == 0:
                stand.submit(ask(prompt(), rng.randint(1, 12), arrived=at))
            stand.plan()
            core = stand.core
            request = ask(prompt(), rng.randint(1, 12))
            found = core.ledger.index.peek(core.ledger.index.root(""), request.tokens()[:-1])
            cached = [slot for node, length in found for slot in node.slots[:length].tolist()]
            outlook = core.door.look()
            gauge = foresight(outlook.view)
            assert gauge._shared + gauge._peaks.worst() == by_slot(core, [], [])
            (newcomer,) = newcomers(outlook, found, (request,), 0)
            assert newcomer.delay == 1
            peaks = gauge._peaks.with_one(np.array([newcomer.held]), np.array([newcomer.cap - 1]))
            for place, slots in newcomer.owners:
                peaks.share(place, slots)
            assert gauge._shared + peaks.worst() == by_slot(core, [request], cached)
            shared += any(node.pins > 1 for node, _ in found)
            stand.receive()
    assert shared > 100 or not prefix_cache


def test_a_shared_prefix_is_not_freed_by_the_row_that_computed_it():
    """The first row ends soon, but its prompt stays with the second: together with the third it would not fit."""
    stand = Stand(rows=4, slots=40, chunk_budget=64, chunk_size=64, policy=Conservative())
    system = [1] * 20
    stand.submit(ask(system, 2), ask([*system, 2], 10))
    stand.plan()
    assert len(stand.core.ledger.running) == 2
    stand.submit(ask([3] * 5, 8))
    stand.plan()
    assert len(stand.core.ledger.running) == 2, "20 shared, 10 and 12 of their own: 42 of 40"
    stand.finish()
    assert stand.core.paused_total == 0
