import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiollm.workers.stream import HostStream, Pending, Split


def test_work_runs_in_the_order_of_its_launches_and_off_the_callers_thread() -> None:
    stream, done, gate = HostStream(), list[int](), threading.Event()
    first = stream.launch(gate.wait)
    rest = [stream.launch(lambda at=at: done.append(at)) for at in range(50)]  # type: ignore[misc]
    where = stream.launch(threading.get_ident)
    assert not first.done and not rest[-1].done
    gate.set()
    where.wait()
    assert done == list(range(50))
    assert where.result != threading.get_ident()
    assert all(a.ended <= b.began for a, b in zip([first, *rest], rest, strict=False))
    stream.close()


def test_an_error_belongs_to_its_launch_and_the_stream_goes_on() -> None:
    stream = HostStream()
    failed, fine = stream.launch(lambda: 1 // 0), stream.launch(lambda: 5)
    fine.wait()
    assert isinstance(failed.error, ZeroDivisionError)
    assert (fine.result, fine.error) == (5, None)
    stream.close()


def test_closing_runs_what_is_queued() -> None:
    stream, gate = HostStream(), threading.Event()
    stream.launch(gate.wait)
    last = stream.launch(lambda: "last")
    gate.set()
    stream.close()
    assert last.result == "last"


def test_the_streams_thread_works_in_its_mode() -> None:
    entered: list[int] = []

    @contextmanager
    def mode() -> Iterator[None]:
        entered.append(threading.get_ident())
        yield

    stream = HostStream(mode)
    pending = stream.launch(threading.get_ident)
    pending.wait()
    assert entered == [pending.result]
    stream.close()


def test_a_launch_times_its_work() -> None:
    pending = Pending()
    assert not pending.done
    pending.run(lambda: None)
    assert pending.done and 0 < pending.began <= pending.ended


def test_what_a_launch_in_two_waited_between_them_is_no_work_of_it() -> None:
    first, second = Pending(), Pending()
    pending = Split(first)
    first.began, first.ended = 1.0, 3.0
    second.began, second.ended = 10.0, 14.0
    first._done.set()
    second._done.set()
    pending.follow(second)
    pending.wait()
    assert (pending.began, pending.ended, pending.worked) == (1.0, 14.0, 6.0)


def test_a_launch_whose_rest_never_came_worked_on_its_beginning() -> None:
    first = Pending()
    first.run(lambda: None)
    pending = Split(first)
    pending.abandon(ValueError())
    pending.wait()
    assert pending.worked == pending.ended - pending.began == first.worked
