import random

import numpy as np
import pytest

from aiollm.engine.slots import SlotPool


def test_any_order_of_takes_and_gives_agrees_with_a_set_of_free_slots():
    for seed in range(20):
        rng = random.Random(seed)
        size = rng.choice([1, 7, 64, 300])
        pool, free, held = SlotPool(size), set(range(size)), []
        for _ in range(300):
            if rng.random() < 0.5:
                wanted = rng.randint(0, max(1, size // 3))
                if wanted > len(free):
                    with pytest.raises(MemoryError, match=f"{wanted} KV slots wanted, {len(free)} free"):
                        pool.take(wanted)
                else:
                    taken = pool.take(wanted).tolist()
                    assert len(set(taken)) == wanted and set(taken) <= free
                    free -= set(taken)
                    held += taken
            else:
                rng.shuffle(held)
                given = [held.pop() for _ in range(rng.randint(0, len(held)))]
                pool.give(np.array(given, np.int32))
                free |= set(given)
            assert set(np.flatnonzero(pool.check()).tolist()) == free
            assert pool.free == len(free)


def test_slots_come_in_runs():
    pool = SlotPool(100)
    first, second = pool.take(10), pool.take(20)
    assert first.tolist() == list(range(10)) and second.tolist() == list(range(10, 30))
    pool.give(first)
    pool.give(second)
    assert pool.take(70).tolist() == list(range(30, 100)), "what was never used comes first"
    assert pool.take(30).tolist() == list(range(30)), "two neighbours that came back are one run"


def test_what_was_given_is_not_looked_at_again_when_its_giver_writes_to_it():
    pool = SlotPool(8)
    slots = pool.take(4).copy()
    pool.give(slots)
    slots[:] = 7
    pool.check()


def test_neighbours_join_again_whatever_the_order_they_come_back_in():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pool = SlotPool(60)
        parts = [pool.take(int(rng.integers(1, 6))) for _ in range(10)]
        rng.shuffle(parts)
        for part in parts:
            pool.give(rng.permutation(part))
        assert pool.take(60).tolist() == list(range(60)), "one run again"


def test_single_slots_serve_where_no_run_is_left():
    pool = SlotPool(10)
    slots = pool.take(10)
    pool.give(slots[::2])
    assert sorted(pool.take(5).tolist()) == [0, 2, 4, 6, 8]


def test_a_slot_that_is_free_is_not_taken_back_and_nothing_changes():
    pool = SlotPool(8)
    slots = pool.take(4)
    for wrong in ([5], [0, 1, 6], [2, 2]):
        with pytest.raises(ValueError, match="freed twice"):
            pool.give(np.array(wrong, np.int32))
        pool.check()
        assert pool.free == 4
    pool.give(slots)
    assert pool.free == 8


def test_a_pool_of_nothing():
    pool = SlotPool(0)
    assert len(pool.take(0)) == 0 and len(pool.check()) == 0
    with pytest.raises(MemoryError):
        pool.take(1)


@pytest.mark.parametrize("break_it", ["mask", "count", "lost", "twice"])
def test_check_sees_a_pool_that_disagrees_with_itself(break_it):
    pool = SlotPool(16)
    pool.give(pool.take(8)[2:4])
    pool.check()
    if break_it == "mask":
        pool._is_free[0] = True
    elif break_it == "count":
        pool.free += 1
    elif break_it == "lost":
        pool._count -= 1
    else:
        pool._at -= 1
    with pytest.raises(AssertionError):
        pool.check()
