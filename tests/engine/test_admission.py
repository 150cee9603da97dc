import random
from collections import Counter

import numpy as np
import pytest
from plain_worker import Stand, ask

from aiollm.engine.admission import Outlook, peak
from aiollm.engine.scheduler import aggressive, worst_case


def simulate(held, remaining):
    """Every row alive takes one more slot per step, and leaves when it has taken all of its own."""
    rows, most = [[a, b] for a, b in zip(held, remaining, strict=True)], 0
    while rows:
        most = max(most, sum(a for a, _ in rows))
        rows = [[a + 1, b - 1] for a, b in rows if b]
    return most


def test_peak_is_that_of_rows_that_grow_in_step():
    rng = random.Random(0)
    for _ in range(2000):
        count = rng.randint(0, 6)
        held = [rng.randint(0, 20) for _ in range(count)]
        remaining = [rng.choice([0, rng.randint(0, 5), rng.randint(0, 30)]) for _ in range(count)]
        assert peak(np.array(held, np.int64), np.array(remaining, np.int64)) == simulate(held, remaining)


def by_slot(core, request, cached_slots):
    """The peak with `request`, counted slot by slot: what one row alone uses goes with it, the rest stays.

    Without a request it is that of the rows that run.
    """
    newcomers = [] if request is None else [request]
    rows = [row.slots[: row.granted].tolist() for row in core.running.values()] + [cached_slots for _ in newcomers]
    users = Counter(slot for slots in rows for slot in slots)
    known = [max(row.granted, len(row.tokens)) for row in core.running.values()] + [new.known for new in newcomers]
    requests = [row.request for row in core.running.values()] + newcomers
    held = [
        sum(users[slot] == 1 for slot in slots) + most - len(slots) for slots, most in zip(rows, known, strict=True)
    ]
    if newcomers:
        held[-1] = request.known - len(cached_slots)
    only_cached = sum(users[slot] == 1 for slot in cached_slots)
    shared = sum(count > 1 for count in users.values()) + only_cached
    return shared + simulate(held, [max(0, core.predict(r) - 1 - r.known) for r in requests])


@pytest.mark.parametrize("predict", [worst_case, aggressive])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_outlook_counts_what_rows_share_once_and_what_they_own_until_they_end(predict, prefix_cache):
    rng, shared = random.Random(1), 0
    for _ in range(25):
        stand = Stand(rows=6, slots=80, chunk_budget=rng.choice([5, 16]), prefix_cache=prefix_cache, predict=predict)
        systems = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(2)]

        def prompt(rng=rng, systems=systems):
            return [*rng.choice(systems), *(rng.randrange(50) for _ in range(rng.randint(1, 5)))]

        for at in range(40):
            if at % 3 == 0:
                stand.submit(ask(prompt(), rng.randint(1, 12), arrived=at))
            stand.plan()
            core = stand.core
            request = ask(prompt(), rng.randint(1, 12))
            found = core.index.peek(core.index.root(""), request.tokens()[:-1])
            cached = [slot for node, length in found for slot in node.slots[:length].tolist()]
            fresh = Outlook(core.index, predict, core.limits.rows + 1)
            fresh.read(core.running.values())
            assert fresh.peak(request, found) == by_slot(core, request, cached)
            assert fresh.worst() == by_slot(core, None, [])
            shared += any(node.pins > 1 for node, _ in found)
            stand.receive()
    assert shared > 100 or not prefix_cache


def test_admissions_of_one_plan_see_each_other():
    """Rows that were admitted a moment ago count as if the outlook were taken anew."""
    rng, several = random.Random(2), 0
    for _ in range(60):
        stand = Stand(rows=8, slots=400, chunk_budget=200, chunk_size=200)
        core = stand.core
        systems = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(2)]
        requests = [ask([*rng.choice(systems), *(rng.randrange(3) for _ in range(3))], 5) for _ in range(3)]
        requests += [ask([*rng.choice(requests).prompt, rng.randrange(3)], 5) for _ in range(5)]
        stand.submit(*requests[:3])
        stand.round()
        stand.submit(*requests[3:7])
        before = len(core.running)
        stand.plan()
        several += len(core.running) - before > 1
        core._outlook.read(core.running.values())
        fresh = Outlook(core.index, worst_case, core.limits.rows)
        fresh.read(core.running.values())
        found = core.index.peek(core.index.root(""), requests[7].tokens()[:-1])
        assert core._outlook.peak(requests[7], found) == fresh.peak(requests[7], found)
    assert several > 30


def test_a_shared_prefix_is_not_freed_by_the_row_that_computed_it():
    """The first row ends soon, but its prompt stays with the second: together with the third it would not fit."""
    stand = Stand(rows=4, slots=40, chunk_budget=64, chunk_size=64)
    system = [1] * 20
    stand.submit(ask(system, 2), ask([*system, 2], 10))
    stand.plan()
    assert len(stand.core.running) == 2
    stand.submit(ask([3] * 5, 8))
    stand.plan()
    assert len(stand.core.running) == 2, "20 shared, 10 and 12 of their own: 42 of 40"
    stand.finish()
    assert stand.core.paused_total == 0
