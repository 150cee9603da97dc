"""Threads that build grammars: how many, for how long, and what is done about those that do not come back."""

import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from aiollm.workers.building import NICE, STACK, TELLING, Builders, Stuck, Watch

SECONDS = 20  # what takes longer hangs


def running() -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def test_as_many_jobs_as_there_may_be_threads_run_side_by_side_and_the_others_in_order() -> None:
    builders, side_by_side, over, order = Builders(2), threading.Barrier(3), threading.Event(), []

    def first() -> None:
        side_by_side.wait(SECONDS)
        assert over.wait(SECONDS)

    jobs = [builders.submit(first) for _ in range(2)]
    jobs += [builders.submit(order.append, at) for at in range(5)]
    side_by_side.wait(SECONDS)
    assert not any(job.running() for job in jobs[2:])
    over.set()
    for job in jobs:
        job.result(SECONDS)
    assert sorted(order) == list(range(5)) and order[0] in (0, 1), "two of them at once"


class Panic(BaseException):
    pass


def test_what_a_job_raises_is_its_own() -> None:
    def fails() -> None:
        raise Panic

    builders = Builders(1)
    failed = builders.submit(fails)
    assert builders.submit(int, "7").result(SECONDS) == 7
    assert isinstance(failed.exception(SECONDS), Panic)


def test_what_is_cancelled_before_it_began_never_begins() -> None:
    builders, over = Builders(1), threading.Event()
    began: list[int] = []
    builders.submit(over.wait, SECONDS)
    dropped, kept = builders.submit(began.append, 1), builders.submit(began.append, 2)
    assert dropped.cancel()
    over.set()
    kept.result(SECONDS)
    assert began == [2]


def test_the_end_cancels_what_has_not_begun() -> None:
    builders, over = Builders(1), threading.Event()
    first, second = builders.submit(over.wait, SECONDS), builders.submit(int)
    builders.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        second.result(0)
    over.set()
    assert first.result(SECONDS)


def test_a_job_has_a_large_stack_and_gives_way_to_the_loop() -> None:
    usual = threading.stack_size()

    def looked() -> tuple[int, bool]:
        with open("/proc/self/maps", encoding="ascii") as file:
            sizes = [[int(end, 16) for end in line.split()[0].split("-")] for line in file]
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return nice, any(STACK - 65536 <= high - low <= STACK + 65536 for low, high in sizes)

    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert Builders(1).submit(looked).result(SECONDS) == (min(nice + NICE, 19), True)
    assert threading.stack_size() == usual and os.getpriority(os.PRIO_PROCESS, 0) == nice


def test_a_job_that_never_ends_keeps_no_process() -> None:
    program = (
        "import threading\nfrom aiollm.workers.building import Builders\nBuilders(1).submit(threading.Event().wait)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=False).returncode == 0


def test_what_runs_for_too_long_is_overdue_until_it_is_done() -> None:
    watch, work = Watch(2, late=10.0), running()
    watch.add(work)
    assert watch.overdue(0.0) == watch.overdue(10.0) == set()
    assert watch.overdue(10.1) == {work}
    watch.add(work)
    assert watch.overdue(10.2) == {work}
    work.set_result(None)
    assert watch.overdue(10.3) == set() and not watch._begun


def test_what_waits_for_a_thread_is_not_overdue() -> None:
    watch, work = Watch(1, late=10.0), Future[Any]()
    watch.add(work)
    assert watch.overdue(0.0) == watch.overdue(100.0) == set()
    work.set_running_or_notify_cancel()
    assert watch.overdue(200.0) == set() and watch.overdue(210.1) == {work}
    watch.check(210.1)


def test_what_is_done_already_is_not_kept() -> None:
    watch, work = Watch(1), running()
    work.set_result(None)
    watch.add(work)
    assert not watch._begun


def test_no_thread_is_left_once_all_are_overdue_and_who_waits_was_told() -> None:
    watch, works = Watch(2, late=10.0), [running(), running()]
    for at, work in enumerate(works):
        watch.add(work)
        watch.overdue(at)
    watch.check(11.1)
    watch.check(10.5 + TELLING)
    with pytest.raises(Stuck, match="all 2 threads"):
        watch.check(11.1 + TELLING)
    works[0].set_result(None)
    watch.check(11.1 + TELLING)
