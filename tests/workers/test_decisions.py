"""Rule O: two loops, each with its own pipes, and a log between them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import pytest
from overlap import ListOutbox, PositionRunner, loop_of, start
from updates import begin, run_of

from aiollm.wire.columns import ints
from aiollm.wire.framing import FrameReader, FrameWriter
from aiollm.wire.messages import Result, ToWorker, Update, encoder
from aiollm.wire.sampling import AllowedIds, SamplingParams
from aiollm.workers.constraints import Constraints, Filled
from aiollm.workers.decisions import Decisions
from aiollm.workers.filters import Words
from aiollm.workers.flight import Outcome
from aiollm.workers.loop import Loop
from aiollm.workers.pipes import PipeInbox
from aiollm.workers.step import Step


class Rank(NamedTuple):
    loop: Loop
    runner: PositionRunner
    outbox: ListOutbox
    server: FrameWriter

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.server.send(encoder.encode(message))
        self.server.flush_blocking()


class Ends:
    """Pipes whose ends are closed at the end of a test, unless it closed them."""

    def __init__(self) -> None:
        self.open: list[int] = []

    def pipe(self, flags: int = 0) -> tuple[int, int]:
        read, write = os.pipe2(flags)
        self.open += (read, write)
        return read, write

    def close(self, *fds: int) -> None:
        for fd in fds:
            self.open.remove(fd)
            os.close(fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    pipes = Ends()
    yield pipes
    pipes.close(*pipes.open)


def rank(ends: Ends, decisions: Decisions, runner: PositionRunner | None = None) -> Rank:
    read, write = ends.pipe(os.O_NONBLOCK)
    runner, outbox = runner or PositionRunner(), ListOutbox()
    return Rank(loop_of(PipeInbox(FrameReader(read)), outbox, runner, decisions), runner, outbox, FrameWriter(write))


class Pair(NamedTuple):
    leader: Rank
    follower: Rank
    log: tuple[int, int]


def pair(ends: Ends, runner: PositionRunner | None = None) -> Pair:
    log = ends.pipe()
    return Pair(rank(ends, Decisions(followers=[log[1]]), runner), rank(ends, Decisions(source=log[0])), log)


def test_a_follower_launches_what_the_leader_launches(ends: Ends) -> None:
    """Its copies of the updates come earlier or later than the leader's; the steps are the same."""
    leader, follower, _ = pair(ends)
    finish = [start(leader.loop), start(follower.loop)]
    ahead: list[Update] = []
    for n in range(1, 41):
        row, old = n % 4, [n % 4] if n > 4 else []
        prompt, outputs = [7] * (1 + n % 3), 2 + n % 5
        ahead.append(begin(n, row, prompt, credit=n % 5, outputs=outputs, generation=n, retire=old))
        leader.send(ahead[-1])
        if n % 7 == 0 or n == 40:
            follower.send(*ahead)
            ahead = []
    ends.close(leader.server.fd, follower.server.fd)
    for wait in finish:
        wait()
    assert leader.runner.steps == follower.runner.steps
    applied = [[m.header.applied for m in r.outbox.sent if isinstance(m, Result)] for r in (leader, follower)]
    assert applied[0] == applied[1]
    assert len(applied[0]) == len(leader.runner.steps) >= 40
    assert sum(len(ints(m.tokens)) for m in leader.outbox.sent if isinstance(m, Result)) >= 40


def test_ranks_agree_on_who_waits_for_a_grammar_and_who_draws_later(ends: Ends) -> None:
    """A row draws from its third look on, and cannot draw its third token until six looks later."""

    class Scripted(Constraints):
        looks = 0

        def unbuilt(self) -> list[int]:
            self.looks += 0 in self._rows
            return [0] if self.looks < 3 or (held and self.looks < held[0] + 6) else []

        def fill(self, rows: Sequence[int], lines: Words) -> Filled:
            if len(self._rows[0].tokens) == 2 and not held:
                held.append(self.looks)
                lines.fill(0)
                return Filled({}, [0])
            return super().fill(rows, lines)

    held = list[int]()
    leader, follower, _ = pair(ends)
    leader.loop.constraints = Scripted(None, 64)
    masked = SamplingParams(temperature=0.0, constraints=(AllowedIds((1, 2)),))
    both = [
        begin(1, 0, [7, 7], credit=9, outputs=6, sampling=masked),
        begin(2, 1, [7], first_slot=20, credit=40, outputs=40),
    ]
    finish = [start(leader.loop), start(follower.loop)]
    for member in (leader, follower):
        member.send(*both)
    ends.close(leader.server.fd, follower.server.fd)
    for wait in finish:
        wait()
    assert leader.runner.steps == follower.runner.steps
    mine = [at for step in leader.runner.steps for row, at in step if row == 0]
    assert mine == [0, 1, 2, 3, 3, 4, 5, 6], "it computes the last of the prompt again, and then its third token"
    results = [message for message in leader.outbox.sent if isinstance(message, Result)]
    drawn = [
        token
        for result in results
        for row, token in zip(ints(result.rows).tolist(), ints(result.tokens).tolist(), strict=True)
        if row == 0
    ]
    assert drawn == [2, 3, 4, 5, 6, 7]
    assert [ints(result.header.held).tolist() for result in results if result.header.held] == [[0]]
    assert {0} == {row for result in results for row in ints(result.header.waiting).tolist()}


def test_a_follower_that_would_run_other_rows_stops(ends: Ends) -> None:
    leader, follower, log = pair(ends)
    finish = [start(leader.loop), start(follower.loop)]
    leader.send(begin(1, 0, [7], credit=5, outputs=9))
    follower.send(begin(1, 0, [7], credit=1, outputs=9))  # stalls where the leader goes on
    with pytest.raises(RuntimeError, match="fell out of step with rank 0 at iteration"):
        finish[1]()
    ends.close(log[0])
    leader.send(Update(number=2, slots=run_of(0, 6, range(8))))
    with pytest.raises(EOFError, match="a rank that follows went away"):
        finish[0]()


def test_a_follower_ends_when_the_leader_is_gone(ends: Ends) -> None:
    log = ends.pipe()
    follower = rank(ends, Decisions(source=log[0]))
    finish = start(follower.loop)
    ends.close(log[1])
    with pytest.raises(EOFError, match="rank 0 went away"):
        finish()


def test_a_follower_ends_when_the_server_is_gone(ends: Ends) -> None:
    """The leader had an update that never reached the follower."""
    read, write = ends.pipe()
    runner = PositionRunner()
    inbox_read, inbox_write = ends.pipe(os.O_NONBLOCK)
    follower = loop_of(PipeInbox(FrameReader(inbox_read)), ListOutbox(), runner, Decisions(source=read))
    finish = start(follower)
    Decisions(followers=[write]).write(0, 1, True, False, np.array([0]))
    ends.close(inbox_write)
    with pytest.raises(EOFError, match="the server went away"):
        finish()


def test_every_rank_leaves_when_the_server_is_gone(ends: Ends) -> None:
    with ExitStack() as stack:
        leader, follower, _ = pair(ends)
        for member in (leader, follower):
            stack.callback(start(member.loop))
            member.send(begin(1, 0, [7], credit=3, outputs=9))
        ends.close(leader.server.fd, follower.server.fd)
    assert leader.runner.steps == follower.runner.steps == [[(0, 0)], [(0, 1)], [(0, 2)], [(0, 3)]]


def test_a_failed_step_of_a_group_is_not_passed_over(ends: Ends) -> None:
    """The other ranks did compute it: only a new group has one state again."""

    class Broken(PositionRunner):
        def run(self, step: Step) -> Outcome:
            raise RuntimeError("no memory")

    leader, follower, log = pair(ends, Broken())
    finish = [start(leader.loop), start(follower.loop)]
    for member in (leader, follower):
        member.send(begin(1, 0, [7]))
    with pytest.raises(RuntimeError, match="no memory"):
        finish[0]()
    assert leader.outbox.sent == []
    ends.close(log[1])
    with pytest.raises(EOFError, match="rank 0 went away"):
        finish[1]()
