import itertools

import pytest

from aiollm.workers.sizes import TOP, Draw, Forward, decode_sizes, early, mixed_sizes, sizes


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 100, 256, 1000, 1024, 4096])
def test_sizes_ascend_to_all_rows_without_gaps_that_cost(rows: int) -> None:
    found = decode_sizes(rows)
    assert found == sorted(set(found)) and found[0] == 1 and found[-1] == rows
    for smaller, larger in itertools.pairwise(found):
        assert larger <= max(smaller + 4, 1.5 * smaller) or larger <= 2 * smaller <= 16


@pytest.mark.parametrize("most", [1, 20, 100, 256, 300, 2112, 3072])
def test_mixed_sizes_reach_the_largest_step(most: int) -> None:
    found = mixed_sizes(most)
    assert found == sorted(set(found)) and found[-1] == most
    assert all(size % 128 == 0 for size in found[:-1] if size > 64)


@pytest.mark.parametrize(("rows", "budget"), [(1, 1), (1, 2048), (6, 3), (64, 2048), (1024, 2048), (1000, 8192)])
def test_the_largest_comes_first_and_all_together_are_few(rows: int, budget: int) -> None:
    every = sizes(rows, budget)
    assert every[0] == Forward(True, rows + budget, min(rows + budget, rows))
    assert len(every) == len(set(every)) <= 220
    assert next(size for size in every if isinstance(size, Draw)) == Draw(TOP, rows)
    for kind in (lambda s: isinstance(s, Forward), lambda s: isinstance(s, Draw) and s.top_n == TOP):
        amounts = [size.tokens if isinstance(size, Forward) else size.sampled for size in every if kind(size)]
        assert amounts == sorted(amounts, reverse=True)
    assert all(size.sequences == min(size.tokens, rows) for size in every if isinstance(size, Forward))


@pytest.mark.parametrize(("rows", "budget"), [(1, 1), (6, 3), (64, 2048), (1000, 2048), (1024, 2048)])
def test_what_is_captured_early_holds_every_step(rows: int, budget: int) -> None:
    every = sizes(rows, budget)
    now = early(every)
    assert set(now) <= set(every) and now == [size for size in every if size in set(now)]
    assert max(size.tokens for size in now if isinstance(size, Forward) and size.mixed) == rows + budget
    assert max(size.tokens for size in now if isinstance(size, Forward) and not size.mixed) == rows
    for top_n in (0, TOP):
        assert max(size.sampled for size in now if isinstance(size, Draw) and size.top_n == top_n) == rows


def test_a_thousand_rows_take_fewer_graphs_than_fit() -> None:
    assert len(sizes(1024, 2048)) < 200 and len(early(sizes(1024, 2048))) < 90
