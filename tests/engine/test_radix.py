import gc
import random
from collections import Counter

import numpy as np
import pytest

from aiollm.engine.integrity import check_index
from aiollm.engine.node import common_prefix, path, subtree
from aiollm.engine.radix import RadixIndex
from aiollm.engine.share import Shares

Prefix = tuple[int, ...]


def keys(*tokens):
    return np.array(tokens, np.int64)


def slots(*numbers):
    return np.array(numbers, np.int32)


def put(index, tokens, first_slot, namespace="", number=0):
    """Keep a sequence whose tokens get the slots from `first_slot` on; the last node."""
    node, found = index.match(index.root(namespace), keys(*tokens))
    rest = tokens[len(found) :]
    if rest:
        node = index.extend(node, keys(*rest), np.arange(first_slot, first_slot + len(rest), dtype=np.int32), number)
    assert node is not None
    return node


def found(index, tokens, namespace=""):
    return sum(length for _, length in index.peek(index.root(namespace), keys(*tokens)))


NAMESPACES = "a", "b", "b\0salt", "c"


def name(namespace):
    return namespace.partition("\0")[0]


class Oracle:
    """The index as a table: (namespace, prefix) -> slot of its last token; pins as a list of what they keep."""

    def __init__(self, rng):
        self.rng = rng
        self.shares = Shares(0.5, {"b": 0.1})
        self.index = RadixIndex(shares=self.shares)
        self.table: dict[tuple[str, Prefix], int] = {}
        self.pins: list[tuple[str, Prefix, object]] = []
        self.numbers: dict[tuple[str, Prefix], int] = {}
        self.slot = 0
        self.number = 0

    def tokens(self):
        return [self.rng.randrange(2 + (i % 3 == 0)) for i in range(self.rng.randint(1, 14))]

    def longest(self, namespace, tokens):
        return next(n for n in range(len(tokens), -1, -1) if n == 0 or (namespace, tuple(tokens[:n])) in self.table)

    def match(self, namespace, tokens):
        length = self.longest(namespace, tokens)
        node, got = self.index.match(self.index.root(namespace), keys(*tokens))
        assert got.tolist() == [self.table[namespace, tuple(tokens[: i + 1])] for i in range(length)]
        assert node.end == length
        return node

    def keep(self):
        namespace, tokens = self.rng.choice(NAMESPACES), self.tokens()
        node = self.match(namespace, tokens)
        begin = node.end
        if begin < len(tokens):
            self.number += 1
            fresh = list(range(self.slot, self.slot + len(tokens) - begin))
            self.slot += len(fresh)
            assert self.index.extend(node, keys(*tokens[begin:]), slots(*fresh), self.number) is not None
            for at, slot in enumerate(fresh, begin):
                self.table[namespace, tuple(tokens[: at + 1])] = slot
                self.numbers[namespace, tuple(tokens[: at + 1])] = self.number

    def pin(self):
        namespace, tokens = self.rng.choice(NAMESPACES), self.tokens()
        node = self.match(namespace, tokens)
        self.index.pin(node)
        self.pins.append((namespace, tuple(tokens[: node.end]), node))

    def unpin(self):
        if self.pins:
            _, _, node = self.pins.pop(self.rng.randrange(len(self.pins)))
            self.index.unpin(node)

    def peek(self):
        namespace, tokens = self.rng.choice(NAMESPACES), self.tokens()
        before = [(node, node.used, len(node.keys)) for root in self.index.roots.values() for node in subtree(root)]
        parts = self.index.peek(self.index.root(namespace), keys(*tokens))
        assert sum(length for _, length in parts) == self.longest(namespace, tokens)
        pinned, at = self.pinned(), 0
        for node, length in parts:
            prefix = tuple(tokens[: at + length])
            assert ((namespace, prefix) in pinned) == (node.pins > 0)
            at += length
        after = [(node, node.used, len(node.keys)) for root in self.index.roots.values() for node in subtree(root)]
        assert [b for b in before if b[0].parent] == [a for a in after if a[0].parent], "peek changed something"

    def pinned(self):
        return {(namespace, prefix[: i + 1]) for namespace, prefix, _ in self.pins for i in range(len(prefix))}

    def evict(self):
        wanted = self.rng.randint(1, 6)
        pinned = self.pinned()
        beyond = self.fullest_beyond()
        order = self.index.evict(wanted).tolist()
        freed = set(order)
        assert len(freed) == min(wanted, len(self.table) - len(pinned))
        gone = {key for key, slot in self.table.items() if slot in freed}
        assert len(gone) == len(freed) and not gone & pinned
        assert not beyond or {name(key[0]) for key in gone if self.table[key] == order[0]} <= beyond
        self.forget(gone)

    def kept(self):
        return Counter(name(key[0]) for key in self.table.keys() - self.pinned())

    def fullest_beyond(self):
        """The parts from which the next slot has to come; any may be where there are none."""
        kept = self.kept()
        full = {part: count / self.shares.of(part) for part, count in kept.items()}
        return {part for part, most in full.items() if most == max(full.values()) and most > sum(kept.values())}

    def reshare(self):
        self.shares = Shares(self.rng.choice([0.1, 0.4, 1.0]), {"b": self.rng.choice([0.2, 0.9])})
        self.index.queues.reshare(self.shares)

    def cut(self):
        if not self.table:
            return
        namespace, prefix = self.rng.choice(sorted(self.table))
        number = self.numbers[namespace, prefix]
        path_numbers = [self.numbers[namespace, prefix[: i + 1]] for i in range(len(prefix))]
        begin = path_numbers.index(number)
        if self.rng.random() < 0.2:
            number += 1000
        top = self.index.cut(self.index.root(namespace), keys(*prefix), begin, number)
        if number != path_numbers[begin]:
            assert top is None
            return
        assert top is not None and top.start == begin
        standing = [pin for pin in self.pins if top in path(pin[2])]
        below = {key for key in self.table if key[0] == namespace and key[1][: begin + 1] == prefix[: begin + 1]}
        for pin in standing:
            assert (pin[0], pin[1]) in below
            self.pins.remove(pin)
            self.index.unpin(pin[2])
        assert set(self.index.remove(top).tolist()) == {self.table[key] for key in below}
        self.forget(below)

    def forget(self, gone):
        for key in gone:
            del self.table[key], self.numbers[key]
        for namespace, prefix in self.table:
            assert len(prefix) == 1 or (namespace, prefix[:-1]) in self.table, "a prefix went before what it leads to"

    def check(self):
        assert sorted(check_index(self.index).tolist()) == sorted(self.table.values())
        pinned = self.pinned()
        assert (self.index.total, self.index.pinned) == (len(self.table), len(pinned))
        assert self.index.evictable == len(self.table) - len(pinned)
        assert self.kept() == {part.name: part.kept for part in self.index.queues.parts.values() if part.kept}
        for namespace, prefix, node in self.pins:
            assert [k for step in reversed([*path(node)]) for k in step.keys.tolist()] == list(prefix)
            assert self.longest(namespace, prefix) == len(prefix)


@pytest.mark.parametrize("seed", range(12))
def test_random_use_agrees_with_a_table_of_prefixes(seed):
    rng = random.Random(seed)
    oracle = Oracle(rng)
    actions = [oracle.keep, oracle.keep, oracle.keep, oracle.pin, oracle.unpin, oracle.peek, oracle.evict, oracle.cut]
    actions.append(oracle.reshare)
    for _ in range(300):
        rng.choice(actions)()
        oracle.check()
    while oracle.pins:
        oracle.unpin()
    oracle.index.evict(10**6)
    assert oracle.index.total == 0


def test_the_leaf_used_longest_ago_goes_first_and_from_its_end():
    index = RadixIndex()
    put(index, [1, 2, 3], 10)
    put(index, [4, 5, 6], 20)
    index.match(index.root(""), keys(1, 2, 3))
    assert index.evict(2).tolist() == [21, 22], "the older one, its tail"
    assert index.evict(2).tolist() == [20, 12], "then the other one's"
    assert found(index, [1, 2, 3]) == 2 and found(index, [4]) == 0
    check_index(index)


def test_a_parent_goes_after_its_children():
    index = RadixIndex()
    put(index, [1, 1, 2, 2], 10)
    put(index, [1, 1, 3], 20)
    assert len(index.evict(3)) == 3
    assert found(index, [1, 1]) == 2
    assert index.evict(9).tolist() == [10, 11]


def test_a_pinned_path_is_never_evicted():
    index = RadixIndex()
    node = put(index, [1, 2, 3], 10)
    index.pin(node)
    put(index, [1, 2, 3, 4], 20)
    assert (index.evictable, index.evict(100).tolist()) == (1, [20])
    index.unpin(node)
    assert sorted(index.evict(100).tolist()) == [10, 11, 12]


def test_a_split_keeps_the_node_that_rows_pinned_and_pins_its_upper_part():
    index = RadixIndex()
    node = put(index, [1, 2, 3, 4], 10, number=5)
    index.pin(node)
    upper, got = index.match(index.root(""), keys(1, 2, 9))
    assert got.tolist() == [10, 11] and upper.end == 2 and upper.number == node.number == 5
    assert node.parent is upper and (node.start, node.end, node.pins, upper.pins) == (2, 4, 1, 1)
    assert index.pinned == 4
    index.unpin(node)
    assert index.pinned == 0
    check_index(index)


def test_a_child_that_begins_alike_is_not_given_twice():
    index = RadixIndex()
    put(index, [1, 2], 0)
    assert index.extend(index.root(""), keys(1, 9), slots(7, 8)) is None
    assert index.total == 2


def test_namespaces_share_nothing_and_leave_nothing_behind():
    index = RadixIndex()
    put(index, [1, 2, 3], 0, "mine")
    assert found(index, [1, 2, 3], "yours") == 0
    assert found(index, [1, 2, 3], "mine") == 3
    gc.collect()
    assert set(index.roots) == {"mine"}, "asking for a prefix keeps no namespace"
    index.evict(3)
    assert not index.roots


def test_a_namespace_lasts_while_a_row_stands_in_it():
    index = RadixIndex()
    root = index.root("salt")
    index.pin(root)
    assert index.root("salt") is root
    node = index.extend(root, keys(1), slots(0))
    index.unpin(root)
    del root, node
    gc.collect()
    assert found(index, [1], "salt") == 1


def test_cut_finds_only_what_an_update_was_to_compute():
    index = RadixIndex()
    put(index, [1, 2], 0, number=1)
    put(index, [1, 2, 3, 4], 10, number=2)
    put(index, [1, 2, 3, 4, 5], 20, number=3)
    root = index.root("")
    assert index.cut(root, keys(1, 2, 3, 4), 2, 1) is None, "another update computed it"
    assert index.cut(root, keys(1, 2, 8), 2, 2) is None, "not on the way"
    top = index.cut(root, keys(1, 2, 3, 4), 3, 2)
    assert top is not None and (top.start, top.end) == (3, 4), "cut off where the failure began"
    assert sorted(index.remove(top).tolist()) == [11, 20]
    assert check_index(index).tolist() == [0, 1, 10]
    assert index.cut(root, keys(1, 2, 3, 4), 3, 2) is None, "gone"


def test_a_node_in_use_is_not_removed():
    index = RadixIndex()
    node = put(index, [1, 2], 0)
    index.pin(node)
    with pytest.raises(AssertionError, match="in use"):
        index.remove(node)


def test_unpinning_too_often_is_refused():
    index = RadixIndex()
    node = put(index, [1], 0)
    with pytest.raises(AssertionError, match="more often"):
        index.unpin(node)


def test_a_nodes_arrays_are_its_own():
    index = RadixIndex()
    tokens, places = keys(1, 2), slots(5, 6)
    index.extend(index.root(""), tokens, places)
    tokens[:], places[:] = 9, 9
    assert index.match(index.root(""), keys(1, 2))[1].tolist() == [5, 6]


def test_common_prefix():
    assert common_prefix(keys(), keys(1)) == 0
    assert common_prefix(keys(1, 2, 3), keys(1, 2)) == 2
    assert common_prefix(keys(1, 2, 3), keys(1, 5, 3)) == 1


@pytest.mark.parametrize("spoil", ["count", "end", "pins", "queue", "first", "part", "kept", "rank"])
def test_check_sees_a_tree_that_disagrees_with_itself(spoil):
    index = RadixIndex()
    leaf = put(index, [1, 2, 3], 0)
    put(index, [1, 2, 4], 10)
    put(index, [1], 20, "other")
    check_index(index)
    if spoil == "count":
        index.total += 1
    elif spoil == "end":
        leaf.end += 1
    elif spoil == "pins":
        leaf.pins = 1
    elif spoil == "queue":
        leaf.queued = False
    elif spoil == "part":
        leaf.part = index.root("other").part
    elif spoil == "kept":
        leaf.part.kept -= 1
    elif spoil == "rank":
        index.queues.fullest.noted[leaf.part] = 0.0
    else:
        leaf.keys[0] = 8
    with pytest.raises(AssertionError):
        check_index(index)
