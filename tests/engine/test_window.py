import numpy as np
import pytest
from plain_worker import Stand, ask

from aiollm.engine.integrity import check_index
from aiollm.engine.node import subtree
from aiollm.engine.radix import RadixIndex
from aiollm.engine.window import Window


def keys(*tokens):
    return np.array(tokens, np.int64)


def put(index, first, tokens, node=None):
    """Keep tokens behind a node, with their windows; slots count on from `first`."""
    count = len(tokens)
    slots = np.arange(first, first + 3 * count, dtype=np.int32).reshape(3, count)
    node = index.extend(node or index.root(""), keys(*tokens), slots[0], windows=slots[1:])
    assert node is not None
    return node


def found(index, tokens):
    return sum(length for _, length in index.peek(index.root(""), keys(*tokens)))


def lose(index, node):
    """Let a node lose its windows: nobody matched it, and whoever computed it is past it."""
    node.hits = 0
    kept = index.pin(node, low=node.start)
    index.unpin(node, kept=index.release(node, kept, node.end, node.end))
    wanted = node.windows.size
    freed = index.evict(wanted)
    assert len(freed) == wanted and node.windows is None


def count(to):
    return list(range(1, to + 1))


@pytest.fixture
def index():
    return RadixIndex(window=Window(4, 2))


def test_a_model_without_windows_takes_a_slot_for_a_token():
    none = Window()
    assert (none.each, none.behind, none.low(7), none.worst(9, 5), none.longest(9, 5)) == (1, 0, 0, 9, 9)
    assert none.growth(3, np.array([1, 2])) == 0 == none.seen(np.array([5]))


def test_the_longest_row_is_the_last_that_a_pool_holds_at_its_worst():
    for window in (Window(1, 1), Window(4, 3), Window(40, 2)):
        for chunk in (1, 10, 100):
            for slots in range(window.each, 700, 7):
                longest = window.longest(slots, chunk)
                assert window.worst(longest, chunk) <= slots < window.worst(longest + 1, chunk)


def test_rows_grow_faster_until_they_are_as_long_as_what_a_window_reaches():
    window = Window(5, 3)  # 4 tokens behind, and one more before any goes back
    assert window.growth(np.array([0, 3, 9]), np.array([[2, 2, 2], [9, 9, 9]])).tolist() == [[6, 6, 0], [15, 6, 0]]
    assert window.seen(np.array([-1, 2, 9])).tolist() == [0, 6, 15]


def test_a_match_ends_where_all_that_a_window_shows_is_complete(index):
    first = put(index, 100, [1, 2, 3, 4])
    second = put(index, 200, [5, 6], first)
    third = put(index, 300, [7, 8, 9, 10, 11], second)
    assert found(index, range(1, 12)) == 11
    lose(index, second)
    assert found(index, range(1, 12)) == 11, "the last three tokens are there"
    assert found(index, [*range(1, 10), 99]) == 9, "and those before the ninth"
    assert found(index, [*range(1, 9), 99]) == 4, "but not those before the eighth"
    assert found(index, [1, 2, 99]) == 2, "nothing lies before the first"
    lose(index, first)
    assert found(index, [1, 2, 99]) == 0 and found(index, range(1, 12)) == 11
    lose(index, third)
    assert found(index, range(1, 12)) == 0
    check_index(index)
    assert index.total == 11


def test_what_was_lost_can_be_completed(index):
    first = put(index, 100, [1, 2, 3, 4])
    lose(index, first)
    node, length = index.step(index.root(""), keys(1, 2, 3, 99))
    assert (node, length) == (first, 3) and found(index, [1, 2]) == 0
    upper = index.take_over(node, 3)
    index.complete(upper, np.arange(6, dtype=np.int32).reshape(2, 3))
    assert found(index, [1, 2, 3, 4]) == 3
    assert index.slots(first, 0).tolist() == [[100, 101, 102, 103], [0, 1, 2, 0], [3, 4, 5, 0]]
    assert check_index(index).size == index.total == 4 + 6


def test_guarded_windows_stay_and_the_others_count_as_free(index):
    first = put(index, 100, [1, 2, 3, 4])
    second = put(index, 200, [5, 6], first)
    assert index.evictable == 18
    assert index.pin(second, low=3) == 0 and index.evictable == 0
    assert index.release(second, 0, 4, 0) == 4, "the first node ends there"
    assert (index.evictable, index.pinned) == (8, 4 + 6)
    check_index(index)
    assert sorted(index.evict(99).tolist()) == list(range(104, 112))
    index.unpin(second, kept=4)
    check_index(index)
    assert index.evictable == index.total == 4 + 6


@pytest.mark.parametrize(("tail", "first"), [(2, 202), (1, 102)], ids=["before the end", "at the end of a prompt"])
def test_windows_that_were_never_matched_are_lost_first(index, tail, first):
    used, passed = put(index, 100, [1, 2]), put(index, 200, [3, 4])
    index.match(index.root(""), keys(1, 2))
    index.match(index.root(""), keys(3, 4))
    passed.hits = 0
    for node in (used, passed):
        index.pin(node)
        assert index.release(node, 0, 2, tail) == 2
    assert sorted(index.evict(1).tolist())[-4:] == list(range(first, first + 4))
    check_index(index)


def test_a_leaf_goes_from_its_end_with_its_windows(index):
    put(index, 100, [1, 2, 3])
    assert sorted(index.evict(4).tolist()) == [101, 102, 104, 105, 107, 108], "three for each token"
    assert found(index, [1, 2]) == 1
    check_index(index)


def test_a_split_parts_windows_too(index):
    node = put(index, 100, [1, 2, 3])
    index.pin(node)
    upper, _ = index.match(index.root(""), keys(1, 9))
    assert (upper.windows.tolist(), node.windows.tolist()) == ([[103], [106]], [[104, 105], [107, 108]])
    assert (upper.guards, node.guards) == (1, 1)
    check_index(index)
    assert index.release(node, 0, 1, 0) == 1, "each half on its own"
    check_index(index)


def windowed(**limits):
    return Stand(window=Window(5, 2), rows=4, chunk_budget=16, chunk_size=16, **limits)


def test_a_long_row_holds_the_windows_of_its_end():
    stand = windowed(slots=400, max_length=128)
    stand.submit(ask(count(60), 40))
    for _ in range(20):
        stand.round()
    (row,) = stand.core.ledger.running.values()
    held = stand.core.limits.slots - stand.core.ledger.pool.free - stand.core.ledger.index.evictable
    assert row.granted <= held <= row.granted + 2 * (row.granted - row.request.known + 5 + 1 + 16)
    stand.finish()


def test_a_prompt_that_returns_is_matched_and_one_whose_windows_are_lost_is_computed_in_its_place():
    stand = windowed(slots=400)
    stand.submit(ask(count(40), 2))
    stand.finish()
    again = ask(count(40), 2)
    stand.submit(again)
    stand.finish()
    assert again.cached_tokens == 39
    core = stand.core
    for root in core.ledger.index.roots.values():
        for node in subtree(root):
            if node.windows is not None:
                core.ledger.pool.give(core.ledger.index._lose(node))
    tokens = core.ledger.index.total
    third = ask(count(40), 2)
    stand.submit(third)
    stand.finish()
    assert third.cached_tokens == 0 and third.output == again.output
    assert core.ledger.index.total == tokens + 2 * 39, "windows were added, and nothing is there twice"
    check_index(core.ledger.index)
