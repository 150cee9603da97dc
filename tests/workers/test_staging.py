import threading
from collections.abc import Iterable

import numpy as np
import torch

from aiollm.workers.staging import PLACES, Staging, views
from aiollm.workers.stream import Pending


def long(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int64)


def test_columns_come_back_as_views_of_one_buffer() -> None:
    staged = Staging().put({"a": long([1, 2]), "b": long([]), "c": long([3])})
    copy = staged.buffer.clone()
    found = views(copy, staged.places)
    assert {name: view.tolist() for name, view in found.items()} == {"a": [1, 2], "b": [], "c": [3]}
    copy[0] = 9
    assert found["a"][0] == 9


def test_a_late_launch_keeps_its_memory() -> None:
    """The ring is full of launches that have not run: the next step waits for the oldest, and only for it."""
    staging = Staging()
    launches = [Pending() for _ in range(PLACES)]
    staged = []
    for at, pending in enumerate(launches):
        staged.append(staging.put({"values": long([at] * 10)}))
        staging.guard(pending)
    later: list[list[int]] = []
    writer = threading.Thread(target=lambda: later.append(staging.put({"values": long([99] * 10)}).buffer.tolist()))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    assert [s.buffer.tolist() for s in staged] == [[at] * 10 for at in range(PLACES)]
    launches[0].run(lambda: None)
    writer.join(10)
    assert later == [[99] * 10]
    assert [s.buffer.tolist() for s in staged[1:]] == [[1] * 10, [2] * 10]


def test_a_place_grows_with_what_it_must_hold() -> None:
    staging = Staging()
    for length in (5000, 1):
        staged = staging.put({"values": long(range(length))})
        assert views(staged.buffer, staged.places)["values"].tolist() == list(range(length))


def test_columns_keep_their_type_and_begin_at_multiples_of_16_bytes() -> None:
    given = {"a": np.array([1, -2, 3], np.int32), "b": np.array([0.5], np.float32), "c": long([7])}
    staged = Staging().put(given)
    assert [place.begin for place in staged.places.values()] == [0, 2, 4] and len(staged.buffer) == 6
    found = views(staged.buffer.clone(), staged.places)
    assert {name: (view.tolist(), view.dtype) for name, view in found.items()} == {
        "a": ([1, -2, 3], torch.int32), "b": ([0.5], torch.float32), "c": ([7], torch.int64),
    }  # fmt: skip
