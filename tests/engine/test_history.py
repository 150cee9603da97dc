import numpy as np
import pytest

from aiollm.engine.history import CLASSES, GROWN, POOLED, PRIOR, RECENT, WINDOW, YOUNG, History, Window, distance

CAP = 4096


def history_of(lengths, name="chat"):
    history = History()
    for length in lengths:
        history.add(name, int(length))
    return history


def drawn(history, done=0, cap=CAP, name="chat", count=4000, seed=0):
    columns = (np.full(count, value) for value in (history.number(name), done, cap))
    chances = np.random.default_rng(seed).random((1, count))
    return history.draw(*columns, chances)[0]


def lengths_like(seed, count=WINDOW, low=200, high=2000):
    return np.random.default_rng(seed).integers(low, high, count)


def test_draws_are_distributed_as_the_finished_lengths_were():
    known = lengths_like(1)
    assert distance(np.sort(known), np.sort(drawn(history_of(known)))) < 0.03


@pytest.mark.parametrize("done", [100, 700, 1500, 1990])
def test_draws_for_a_row_that_is_longer_are_from_the_longer_ones(done):
    known = lengths_like(2)
    longer = np.sort(known[known > done])
    lengths = drawn(history_of(known), done)
    assert lengths.min() > done
    if len(longer) > 100:
        assert distance(longer, np.sort(lengths)) < 0.03


def test_a_row_longer_than_all_that_is_known_may_become_as_long_as_it_may():
    lengths = drawn(history_of(lengths_like(3)), 2500)
    assert lengths.min() > 2500 and lengths.max() <= CAP and abs(np.median(lengths) - np.sqrt(2500 * CAP)) < 50


def test_draws_keep_to_max_tokens():
    history = history_of(lengths_like(4))
    assert drawn(history, cap=300).max() == 300
    assert drawn(history, done=299, cap=300).tolist() == [300] * 4000


def test_without_a_history_lengths_are_neither_the_worst_nor_nothing():
    lengths = drawn(History())
    mean = (PRIOR * CAP * 2 / 3 + CAP / np.log(CAP)) / (PRIOR + 1)
    assert abs(lengths.mean() - mean) < 100 and lengths.std() > CAP / 5
    assert drawn(History(), done=2000).min() > 2000


def test_what_is_imagined_fades_as_requests_end():
    means = [drawn(history_of(lengths_like(5, count, 90, 110))).mean() for count in (0, 8, 20, 40, GROWN)]
    assert means == sorted(means, reverse=True) and means[-1] < 140


def begun_together(count, after, name="chat"):
    """A history `after` so many steps: shorter outputs have ended, the others run."""
    lengths, history = np.sort(lengths_like(11, count)), History()
    for length in lengths[lengths <= after].tolist():
        running = np.full(np.sum(lengths >= length), length)
        history.observe(np.full_like(running, history.number(name)), running)
        history.add(name, length)
    running = lengths[lengths > after]
    history.observe(np.full_like(running, history.number(name)), np.full_like(running, after))
    return lengths, history


@pytest.mark.parametrize("after", [700, 1100, 1700])
def test_rows_that_run_are_evidence_of_longer_outputs(after):
    lengths, history = begun_together(300, after)
    assert abs(np.mean(drawn(history) > after) - np.mean(lengths > after)) < 0.04
    known = np.sort(lengths[lengths <= after])
    seen = drawn(history)
    assert distance(known, np.sort(seen[seen <= after])) < 0.06


def test_rows_that_run_do_not_count_where_the_window_is_full():
    """As many as run now began before its first length and ended in it."""
    history = history_of(lengths_like(12, 2 * WINDOW))
    before = drawn(history)
    history.add("chat", 1000)
    history.observe(np.full(500, history.number("chat")), np.full(500, 1900))
    assert distance(np.sort(before), np.sort(drawn(history))) < 0.01


def test_a_class_uses_the_pool_until_it_has_a_history():
    history = history_of(lengths_like(6, low=100, high=200), "short")
    for at in range(YOUNG - 1):
        history.add("long", 3000 + at)
        for length in lengths_like(at, 9, low=100, high=200):
            history.add("short", int(length))
    assert np.median(drawn(history, name="long")) < 210
    history.add("long", 3500)
    assert np.median(drawn(history, name="long")) > 3000
    assert np.median(drawn(history, name="short")) < 200
    assert np.median(drawn(history, name="never heard of")) < 210


def test_rows_of_several_classes_are_drawn_in_one_go():
    history = history_of(lengths_like(7, low=100, high=200), "short")
    for length in lengths_like(7, low=3000, high=4000):
        history.add("long", int(length))
    kinds = np.array([history.number(name) for name in ("short", "long", "none") * 100])
    zeros = np.zeros_like(kinds)
    chances = np.random.default_rng(0).random((3, 300))
    lengths = history.draw(kinds, zeros, zeros + CAP, chances)
    assert lengths.shape == (3, 300)
    assert np.median(lengths[:, 0::3]) < 200 < 2900 < np.median(lengths[:, 1::3])


def test_names_of_classes_do_not_grow_without_end():
    history = History()
    numbers = [history.number(name) for name in range(2 * CLASSES)]
    assert len(set(numbers)) == CLASSES and numbers[-1] == POOLED


def test_a_drift_makes_the_window_forget():
    window = Window()
    for length in lengths_like(8, low=100, high=300):
        window.add(int(length))
    assert window.drifts == 0 and len(window) == WINDOW
    for length in lengths_like(9, 2 * RECENT, 1000, 3000):
        window.add(int(length))
    assert window.drifts > 0 and np.mean(window.curve.edges < 300) < 0.2


def test_what_stays_the_same_is_not_taken_for_a_drift():
    window = Window()
    for length in lengths_like(10, 20_000):
        window.add(int(length))
    assert window.drifts <= 2 and len(window) > WINDOW // 2
