"""The real loop with its two threads, over a runner without a model, for tests of what lies around a turn."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from aiollm.wire.messages import FromWorker, ToWorker
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decisions
from aiollm.workers.flight import Outcome
from aiollm.workers.loop import Inbox, Loop, Outbox, Runner
from aiollm.workers.overlap import run
from aiollm.workers.staging import Staged, Staging, views
from aiollm.workers.step import Room, Step
from aiollm.workers.stream import HostStream

SECONDS = 20  # a loop that takes longer hangs


class PositionRunner:
    """Draws its position for a token; hidden states are the places that were asked for. Keeps (row, first position) of
    each sequence of each step."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int]]] = []

    def room(self, needs: Room, mixed: bool, top_n: int) -> Room:
        return needs

    prepares = False

    def prepare(self) -> None:
        pass

    def run(self, step: Step) -> Outcome:
        columns = views(step.staged.buffer, step.staged.places)
        begins = columns["starts"][:-1].long()
        self.steps.append(list(zip(columns["rows"].tolist(), columns["positions"][begins].tolist(), strict=True)))
        nothing = np.empty((step.sampled, 0))
        drawn = columns["sampled_lengths"].numpy().copy()
        hidden = np.array(step.embeds, np.float32).reshape(-1, 2)
        return Outcome(drawn, np.zeros(step.sampled, np.float32), nothing, nothing, [], hidden)

    def begin(self, step: Step) -> Step:
        return step

    def finish(self, step: Step, begun: Step, masks: Staged | None) -> Outcome:
        assert masks is not None and begun is step
        return self.run(step)


class ListInbox:
    """Hands out one batch of messages a drain; `wait` says that nothing will ever come once all are out."""

    def __init__(self, *batches: Iterable[ToWorker]) -> None:
        self.batches = [list(batch) for batch in batches]

    def drain(self) -> Iterable[ToWorker]:
        return self.batches.pop(0) if self.batches else []

    def quiet(self, seconds: float) -> bool:
        return not self.batches or not self.batches[0]

    def wait(self) -> bool:
        return bool(self.batches)


class ListOutbox:
    """Keeps what was flushed; `fail` is raised by the flush that has something to write."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.waiting: list[FromWorker] = []
        self.sent: list[FromWorker] = []
        self.fail = fail

    def put(self, message: FromWorker) -> None:
        self.waiting.append(message)

    def offer(self) -> None:
        self.flush()

    def flush(self) -> None:
        if self.waiting and self.fail is not None:
            raise self.fail
        while self.waiting:
            self.sent.append(self.waiting.pop(0))


class LateThreads(Executor):
    """Does what is asked of it when told, one thing after the other, but for what was cancelled."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.begun = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.append((future, lambda: function(*args, **kwargs)))
        return future

    def complete(self) -> None:
        """The next thing, where there is one."""
        if self.queue:
            future, work = self.queue.popleft()
            if future.set_running_or_notify_cancel():
                self.begun += 1
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001  the future's own
                    future.set_exception(error)


def loop_of(
    inbox: Inbox, outbox: Outbox, runner: Runner, decisions: Decisions | None = None,
    constraints: Constraints | None = None,
) -> Loop:  # fmt: skip
    return Loop(1, 8, inbox, outbox, HostStream(), runner, Staging(), decisions or Decisions(), constraints)


def start(loop: Loop) -> Callable[[], None]:
    """Run a loop on threads of its own; the value waits for its end, and raises what it raised."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run(loop)
        except BaseException as error:  # noqa: BLE001  raised again by `finish`
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def finish() -> None:
        thread.join(SECONDS)
        assert not thread.is_alive(), "the loop hangs"
        loop.stream.close()
        if raised:
            raise raised[0]

    return finish
