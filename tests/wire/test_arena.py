import os
import random
from collections import deque

import pytest

from aiollm.wire.arena import Arena


@pytest.mark.parametrize("seed", range(4))
def test_live_bodies_never_overlap_and_space_comes_back(seed: int) -> None:
    """Random puts and frees; a reader sees every live body whole, and an empty arena takes what fits."""
    r = random.Random(seed)
    size = r.choice([50, 64, 257])
    arena, live, number = Arena.create(size), deque[tuple[int, int, bytes]](), 0
    for _ in range(3000):
        if r.random() < 0.55:
            body = r.randbytes(r.randint(1, size if r.random() < 0.1 else size // 3))
            offset = arena.put(number + 1, body)
            assert offset is not None or live, "an empty arena refused a body that fits"
            if offset is not None:
                number += 1
                assert 0 <= offset <= size - len(body)
                live.append((number, offset, body))
        elif live:
            freed = r.choice(live)[0]
            arena.free(freed)
            while live and live[0][0] <= freed:
                live.popleft()
        assert arena.used == len(live)
        for _, offset, body in live:
            assert arena.view(offset, len(body)) == body
    assert number > 500
    arena.close()


def test_space_is_freed_in_the_order_it_was_taken() -> None:
    arena = Arena.create(100)
    assert [arena.put(n, bytes(40)) for n in (1, 2)] == [0, 40]
    assert arena.put(3, bytes(40)) is None
    arena.free(0)
    assert arena.put(3, bytes(40)) is None
    arena.free(1)
    assert arena.put(3, bytes(39)) == 0
    arena.free(3)
    assert arena.used == 0
    arena.close()


def test_a_full_arena_is_not_taken_for_an_empty_one() -> None:
    arena = Arena.create(64)
    assert arena.put(1, bytes(32)) == 0
    assert arena.put(2, bytes(32)) == 32
    assert arena.put(3, b"x") is None
    arena.free(1)
    assert arena.put(3, bytes(31)) == 0
    assert arena.put(4, b"x") is None
    arena.close()


def test_a_body_larger_than_the_arena_is_refused() -> None:
    arena = Arena.create(64)
    with pytest.raises(ValueError, match="a message of 65 bytes exceeds the arena of 64 bytes"):
        arena.put(1, bytes(65))
    assert arena.put(1, bytes(64)) == 0
    arena.close()


def test_another_mapping_of_the_descriptor_sees_the_bodies() -> None:
    arena = Arena.create(4096)
    reader = Arena.attach(os.dup(arena.fd))
    offset = arena.put(1, b"shared")
    assert offset is not None and reader.size == 4096
    assert bytes(reader.view(offset, 6)) == b"shared"
    reader.close()
    arena.close()


def test_closing_gives_the_descriptor_back_while_a_view_is_held() -> None:
    arena = Arena.create(64)
    arena.put(1, b"held")
    view = arena.view(0, 4)
    arena.close()
    assert view == b"held"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(arena.fd)
