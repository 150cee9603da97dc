import threading

import numpy as np

from aiollm.workers.staging import PLACES, Staging
from aiollm.workers.step import stage
from aiollm.workers.stream import Pending


def test_columns_come_back_as_views_of_one_buffer() -> None:
    staged = Staging().put(a=[1, 2], b=[], c=np.array([3]))
    copy = staged.buffer.clone()
    views = staged.views(copy)
    assert {name: view.tolist() for name, view in views.items()} == {"a": [1, 2], "b": [], "c": [3]}
    copy[0] = 9
    assert views["a"][0] == 9


def test_a_late_launch_keeps_its_memory() -> None:
    """The ring is full of launches that have not run: the next step waits for the oldest, and only for it."""
    staging = Staging()
    launches = [Pending() for _ in range(PLACES)]
    staged = []
    for at, pending in enumerate(launches):
        staged.append(staging.put(values=[at] * 10))
        staging.guard(pending)
    later: list[list[int]] = []
    writer = threading.Thread(target=lambda: later.append(staging.put(values=[99] * 10).buffer.tolist()))
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
    assert staging.put(values=range(5000)).buffer.tolist() == list(range(5000))
    assert staging.put(values=[1]).buffer.tolist() == [1]


def test_a_step_is_staged_sequence_after_sequence() -> None:
    """A decode row at position 7, a chunk [2, 5) that is not the row's last, and a chunk [0, 2) that is."""
    staged = stage(Staging(), np.array([4, 1, 0]), np.array([7, 2, 0]), np.array([1, 3, 2]), np.array([0, 2]))
    assert {name: view.tolist() for name, view in staged.views(staged.buffer).items()} == {
        "rows": [4, 1, 0],
        "starts": [0, 1, 4, 6],
        "lengths": [8, 5, 2],
        "token_rows": [4, 1, 1, 1, 0, 0],
        "positions": [7, 2, 3, 4, 0, 1],
        "last": [0, 5],
        "sampled_rows": [4, 0],
        "sampled_lengths": [8, 2],
    }
