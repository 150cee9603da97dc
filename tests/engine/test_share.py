"""Parts of the prefix cache and their shares: whose entries leave first."""

import random

import numpy as np
from plain_worker import Stand, answered, ask, count_to

from aiollm.engine.integrity import check_index
from aiollm.engine.radix import RadixIndex
from aiollm.engine.share import SPARE, Part, Ranking, Shares
from aiollm.engine.window import Window


def put(index, namespace, first, length=10):
    """Keep a sequence of its own; its last node. Slots are numbered like its tokens."""
    numbers = np.arange(first, first + length)
    node = index.extend(index.root(namespace), numbers.astype(np.int64), numbers.astype(np.int32))
    assert node is not None
    return node


def kept(index):
    return {name: part.kept for name, part in index.queues.parts.items() if part.kept}


def test_a_ranking_finds_the_smallest_number_while_numbers_rise_untold_and_fall_told():
    rng = random.Random(0)
    parts = [Part(str(at), rng.choice([0.1, 0.5, 1.0])) for at in range(7)]
    ranking = Ranking(lambda part: part.room)
    for _ in range(5000):
        part = rng.choice(parts)
        before, part.kept = part.kept, rng.randrange(50)
        if part.kept > before:
            ranking.note(part)
        if rng.random() < 0.5:
            first, least = ranking.first(), min(part.room for part in parts)
            assert first.room == least if first is not None else not any(part.kept for part in parts)
        assert len(ranking) <= 2 * len(parts) + SPARE
    for part in parts:
        part.kept = 0
    assert ranking.first() is None and not ranking.noted


def test_what_a_part_has_beyond_its_share_goes_before_what_others_used_longer_ago():
    index = RadixIndex(shares=Shares(0.5))
    put(index, "quiet", 0)
    for first in (100, 200, 300):
        put(index, "flood", first)
    assert index.evict(15).tolist() == [*range(100, 110), *range(205, 210)], "its own oldest"
    check_index(index)
    assert index.evict(10).tolist() == [*range(200, 205), *range(5, 10)], "within its share, age decides"


def test_a_flood_takes_of_the_others_no_more_than_one_entry_beyond_its_share():
    index = RadixIndex(shares=Shares(0.8))
    for at in range(20):
        put(index, "quiet", 10 * at)
    for at in range(100, 300):
        if index.total >= 1000:
            index.evict(10)
        put(index, "flood", 10 * at)
        check_index(index)
    assert kept(index) == {"quiet": 190, "flood": 810}


def test_a_key_that_is_alone_has_all_and_so_have_keys_while_nobody_wants_room():
    index = RadixIndex(shares=Shares(0.1))
    put(index, "a", 0)
    put(index, "a", 100)
    assert index.evict(3).tolist() == [7, 8, 9]
    put(index, "b", 200)
    assert kept(index) == {"a": 17, "b": 10}


def test_all_namespaces_of_a_key_are_one_part():
    index = RadixIndex(shares=Shares(0.5))
    put(index, "quiet", 0)
    for at in range(1, 4):
        put(index, f"flood\0salt {at}", 100 * at)
    assert kept(index) == {"quiet": 10, "flood": 30}
    assert index.evict(20).tolist() == [*range(100, 110), *range(200, 210)]
    check_index(index)


def test_of_several_beyond_their_share_the_fullest_for_its_share_goes_first():
    index = RadixIndex(shares=Shares(0.2, {"large": 0.4}))
    put(index, "large", 0, 40)
    put(index, "small", 100, 30)
    put(index, "other", 200, 30)
    assert index.evict(10).tolist() == [*range(120, 130)], "30 of 0.2 are more than 40 of 0.4"
    assert index.evict(10).tolist() == [*range(220, 230)]


def test_what_is_pinned_does_not_count_as_kept():
    index = RadixIndex(shares=Shares(0.5))
    running = put(index, "busy", 0, 50)
    index.pin(running)
    put(index, "busy", 100)
    put(index, "quiet", 200)
    assert kept(index) == {"busy": 10, "quiet": 10}
    assert index.evict(2).tolist() == [108, 109], "none is beyond its share"
    index.unpin(running)
    assert kept(index) == {"busy": 58, "quiet": 10}
    assert index.evict(48).tolist() == [*range(2, 50)], "as soon as it ends it counts"
    check_index(index)


def test_other_shares_hold_from_the_next_eviction_on():
    index = RadixIndex()
    put(index, "a", 0)
    put(index, "b", 100, 30)
    assert index.evict(1).tolist() == [9], "without shares age decides alone"
    index.queues.reshare(Shares(1.0, {"b": 0.5}))
    assert index.evict(1).tolist() == [129]
    index.queues.reshare(Shares(0.1, {"b": 1.0}))
    assert index.evict(1).tolist() == [8]
    check_index(index)


def test_many_uses_of_what_nobody_evicts_leave_no_heap_behind():
    index = RadixIndex(window=Window(4, 2))
    numbers = np.arange(8)
    node = index.extend(index.root(""), numbers, numbers.astype(np.int32), windows=np.ones((2, 8), np.int32))
    for _ in range(100):
        node, _ = index.match(index.root(""), numbers)
        index.unpin(node, kept=index.release(node, index.pin(node), 8, 8))
    assert len(index.queues.parts[""].heap) <= 3


def test_a_flood_of_one_key_leaves_another_keys_prompt_in_the_cache():
    stand = Stand(rows=1, slots=120, shares=Shares(0.5))
    quiet = ask(count_to(40), 2, namespace="quiet")
    stand.submit(quiet)
    stand.finish()
    for seed in range(1, 11):
        stand.submit(ask(count_to(40, seed), 2, namespace="flood"))
        stand.finish()
    again = ask(count_to(40), 2, namespace="quiet")
    stand.submit(again)
    stand.finish()
    assert again.cached_tokens >= 35 and answered(quiet, again)
    stand.die()
    assert stand.core.ledger.index.queues.part("any").share == 0.5, "a fresh worker has the same shares"
    stand.core.share(Shares(0.3, {"any": 0.7}))
    stand.die()
    assert [stand.core.ledger.index.queues.part(name).share for name in ("any", "other")] == [0.7, 0.3]
