"""What lies around a turn: the shell of two threads, its ends and its errors. The turns themselves: test_stamp.py."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from overlap import LateThreads, ListInbox, ListOutbox, PositionRunner, loop_of, start
from updates import begin

from aiollm.wire.columns import floats, ints
from aiollm.wire.messages import Alive, Failed, FromWorker, Reason, Result, Stop, Update
from aiollm.wire.sampling import AllowedIds, Grammar, SamplingParams
from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers.building import Watch
from aiollm.workers.constraints import Constraints, Filled
from aiollm.workers.flight import Outcome
from aiollm.workers.loop import QUIET, SMALL_UPDATES
from aiollm.workers.staging import Staged, views
from aiollm.workers.step import Step
from aiollm.workers.stream import HostStream, Pending, Split, StateLost


def tokens(messages: list[FromWorker]) -> list[int]:
    return [token for message in messages if isinstance(message, Result) for token in ints(message.tokens).tolist()]


def test_a_row_runs_to_its_limit_and_the_loop_ends_with_its_server() -> None:
    runner, outbox = PositionRunner(), ListOutbox()
    start(loop_of(ListInbox([begin(1, 3, [7, 7, 7], credit=3)]), outbox, runner))()
    assert tokens(outbox.sent) == [3, 4, 5, 6]
    assert runner.steps == [[(3, 0)], [(3, 3)], [(3, 4)], [(3, 5)]]
    headers = [message.header for message in outbox.sent if isinstance(message, Result)]
    assert [header.iteration for header in headers] == [1, 2, 3, 4]
    assert {header.applied for header in headers} == {1}


def test_what_an_iteration_brought_is_on_its_way_before_the_launch_that_follows_its_post() -> None:
    """That of iteration k precedes k + 2, while the device is busy with k + 1."""
    outbox, sent = ListOutbox(), []

    class Watched(HostStream):
        def launch(self, work: Callable[[], object]) -> Pending:
            sent.append(len(outbox.sent))
            return super().launch(work)

    inbox = ListInbox([begin(1, 3, [7, 7, 7], credit=9, outputs=10)])
    loop = loop_of(inbox, outbox, PositionRunner())
    loop.stream = Watched()
    start(loop)()
    assert sent == [0, 0, *range(1, 9)]


def test_hidden_states_come_with_the_rows_that_want_them_and_are_alive() -> None:
    """The second iteration has three rows: one that is retired before its end is known, and one that wants none."""
    embeds = SamplingParams(temperature=0.0, embed=True)
    inbox = ListInbox(
        [
            begin(1, 3, [7, 7], credit=9, sampling=embeds),
            begin(2, 2, [7], credit=1),
            begin(3, 5, [7] * 3, sampling=embeds),
        ],
        [], [], [begin(4, 6, [7], retire=[3])],
    )  # fmt: skip
    outbox = ListOutbox()
    start(loop_of(inbox, outbox, PositionRunner()))()
    results = [message for message in outbox.sent if isinstance(message, Result)]
    found = [
        (ints(result.rows).tolist(), ints(result.hidden_at).tolist(), floats(result.hidden).reshape(-1, 2).tolist())
        for result in results
    ]
    assert found[0] == ([3], [0], [[0, 1]])
    assert found[1] == ([3, 2], [0], [[0, 0]])
    assert found[2] == ([2, 5], [1], [[2, 4]])
    assert all(places == [] for _, places, _ in found[3:])


def test_stop_publishes_what_was_launched_and_launches_nothing_more() -> None:
    inbox = ListInbox([begin(1, 0, [7] * 3, credit=100, outputs=100)], [], [], [Stop()])
    runner, outbox = PositionRunner(), ListOutbox()
    start(loop_of(inbox, outbox, runner))()
    assert tokens(outbox.sent) == list(range(3, 3 + len(runner.steps)))
    assert 1 <= len(runner.steps) < 10


def test_stop_while_idle_ends_the_loop() -> None:
    outbox = ListOutbox()
    start(loop_of(ListInbox([], [Stop()]), outbox, PositionRunner()))()
    assert outbox.sent == []


def test_a_burst_of_small_updates_is_applied_though_nothing_runs() -> None:
    """What was drained and not yet applied must not wait for the next message."""
    small = [Update(number=n) for n in range(1, 2 * SMALL_UPDATES)]
    outbox = ListOutbox()
    start(loop_of(ListInbox([*small, begin(2 * SMALL_UPDATES, 0, [7])]), outbox, PositionRunner()))()
    assert tokens(outbox.sent) == [1]


@pytest.mark.parametrize("numbers", [(1, 3), (1, 1), (2,)], ids=str)
def test_updates_out_of_order_end_the_loop(numbers: tuple[int, ...]) -> None:
    loop = loop_of(ListInbox([Update(number=n) for n in numbers]), ListOutbox(), PositionRunner())
    with pytest.raises(ValueError, match=r"update \d arrived after \d"):
        start(loop)()


def test_what_a_turn_raises_comes_out_after_the_results_before_it() -> None:
    outbox = ListOutbox()
    inbox = ListInbox([begin(1, 0, [7], credit=2, outputs=3)], [], [], [], [begin(9, 0, [7])])
    with pytest.raises(ValueError, match="update 9 arrived after 1"):
        start(loop_of(inbox, outbox, PositionRunner()))()
    assert tokens(outbox.sent) == [1, 2, 3]


def test_an_error_between_two_turns_ends_both_threads() -> None:
    """The server is gone, and the thread that writes is not the one that holds the baton."""
    inbox = ListInbox([begin(1, 0, [7], credit=100, outputs=100)])
    with pytest.raises(BrokenPipeError):
        start(loop_of(inbox, ListOutbox(BrokenPipeError()), PositionRunner()))()


MASKED = SamplingParams(temperature=0.0, constraints=(AllowedIds((1, 2)),))


class Refusing(PositionRunner):
    """Draws -1 where a mask allows nothing, as the devices do."""

    def finish(self, step: Step, begun: Step, masks: Staged | None) -> Outcome:
        outcome = super().finish(step, begun, masks)
        assert masks is not None
        columns = views(masks.buffer, masks.places)
        lines = columns["lines"].numpy()[: step.sampled]
        allowed = columns["masks"].numpy().reshape(-1, 2).any(axis=1)
        nothing = [at for at, line in enumerate(lines) if line >= 0 and not allowed[line]]
        outcome.tokens[nothing] = -1
        return outcome


def test_a_masked_row_runs_to_its_limit_beside_a_free_one() -> None:
    runner, outbox = PositionRunner(), ListOutbox()
    rows = [begin(1, 3, [7, 7, 7], credit=3, sampling=MASKED), begin(2, 0, [7], first_slot=20, credit=3)]
    start(loop_of(ListInbox(rows), outbox, runner, constraints=Constraints(None, 64)))()
    assert sorted(tokens(outbox.sent)) == [1, 2, 3, 3, 4, 4, 5, 6]


def test_what_the_device_waits_for_masks_is_idle_time() -> None:
    outbox = ListOutbox()
    inbox = ListInbox([begin(1, 0, [7], outputs=1, sampling=MASKED)])
    loop = loop_of(inbox, outbox, PositionRunner(), constraints=Constraints(None, 64))
    flight = loop.turn(None)
    assert flight is not None and loop.turn(None) is None, "the second turn draws"
    pending = flight.pending
    assert isinstance(pending, Split) and pending._second is not None
    pending.wait()
    pending.first.began, pending.first.ended = 1.0, 3.0
    pending._second.began, pending._second.ended = 10.0, 14.0
    pending.began, pending.ended = 1.0, 14.0
    loop.turn(flight)
    (result,) = outbox.sent
    assert isinstance(result, Result)
    assert (result.header.device_us, result.header.idle_us) == (6_000_000, 7_000_000)
    loop.stream.close()


def test_a_worker_whose_rows_all_wait_for_their_grammars_shows_that_it_is_well() -> None:
    class Patient(ListInbox):
        def quiet(self, seconds: float) -> bool:
            if any(isinstance(message, Alive) for message in outbox.sent):
                threads.complete()
            return super().quiet(seconds)

    threads, outbox = LateThreads(), ListOutbox()
    vocabulary = Vocabulary([bytes([id]) for id in range(64)], special=[0], eos=[0])
    sampling = SamplingParams(temperature=0.0, constraints=(Grammar("regex", "(?s:.)*"),))
    inbox = Patient([begin(1, 0, [7] * 3, credit=3, sampling=sampling)])
    start(loop_of(inbox, outbox, PositionRunner(), constraints=Constraints(vocabulary, 64, threads)))()
    assert [type(message) for message in outbox.sent[:3]] == [Result, Alive, Result]
    assert tokens(outbox.sent) == [3, 4, 5, 6]


def test_a_grammar_that_is_never_built_costs_its_row_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("aiollm.workers.constraints.matcher_of", lambda *_: over.wait())
    vocabulary = Vocabulary([bytes([id]) for id in range(64)], special=[0], eos=[0])
    constraints = Constraints(vocabulary, 64, watch=Watch(late=0.05))
    sampling = SamplingParams(temperature=0.0, constraints=(Grammar("regex", "(?s:.)*"),))
    rows = [begin(1, 3, [7, 7, 7], credit=3, sampling=sampling), begin(2, 0, [7], first_slot=20, credit=3)]
    outbox = ListOutbox()
    start(loop_of(ListInbox(rows), outbox, Refusing(), constraints=constraints))()
    over.set()
    failed = [message for message in outbox.sent if isinstance(message, Result) and message.reasons]
    assert [message.reasons for message in failed] == [
        {3: Reason("the grammar of this request was not built within 0.05 s")}
    ]
    free = [token for message in outbox.sent if isinstance(message, Result) and message not in failed
            for row, token in zip(ints(message.rows), ints(message.tokens), strict=True) if row == 0]  # fmt: skip
    assert free == [1, 2, 3, 4]


def test_masks_that_cannot_be_made_cost_the_rows_of_their_step() -> None:
    constraints, outbox = Constraints(None, 64), ListOutbox()
    fill, broken = constraints.fill, [MemoryError("no room for masks")]

    def fail_once(*given: Any) -> Filled:
        if broken:
            raise broken.pop()
        return fill(*given)

    constraints.fill = fail_once  # type: ignore[method-assign]
    inbox = ListInbox([begin(1, 0, [7], credit=9, outputs=9, sampling=MASKED)], [], [], [begin(2, 1, [7] * 3)])
    start(loop_of(inbox, outbox, PositionRunner(), constraints=constraints))()
    (failure,) = [message for message in outbox.sent if isinstance(message, Failed)]
    assert ints(failure.rows).tolist() == [0] and "no room for masks" in failure.error
    assert tokens(outbox.sent)[-1] == 3


def test_an_error_between_two_turns_frees_the_thread_that_waits_for_a_drawing() -> None:
    inbox = ListInbox([begin(1, 0, [7], credit=100, outputs=100, sampling=MASKED)])
    loop = loop_of(inbox, ListOutbox(BrokenPipeError()), PositionRunner(), constraints=Constraints(None, 64))
    with pytest.raises(BrokenPipeError):
        start(loop)()


def test_a_token_that_is_not_finite_idles_its_row() -> None:
    class NotFinite(PositionRunner):
        def run(self, step: Step) -> Outcome:
            outcome = super().run(step)
            return outcome._replace(tokens=outcome.tokens * 0 - 1)

    runner, outbox = NotFinite(), ListOutbox()
    start(loop_of(ListInbox([begin(1, 0, [7], credit=100, outputs=100)]), outbox, runner))()
    assert tokens(outbox.sent) == [-1]
    assert len(runner.steps) <= 2, "one more may have been launched before the first was posted"


def test_a_step_that_cannot_be_built_costs_its_rows_and_loses_no_upload() -> None:
    """Rule M: the row of the broken step fails; the next step carries what both updates brought."""

    class Keeps(PositionRunner):
        def run(self, step: Step) -> Outcome:
            numbers.append([update.number for update in step.updates])
            return super().run(step)

    numbers: list[list[int]] = []
    runner, outbox = Keeps(), ListOutbox()
    first = begin(1, 0, [7, 7], credit=9, outputs=9)
    second = begin(2, 1, [7] * 3, first_slot=20, credit=9, outputs=3)
    loop = loop_of(ListInbox([first], [second]), outbox, runner)
    build, broken = loop._build, [RuntimeError("no such luck")]

    def fail_once(*columns: Any) -> Step:
        if broken:
            raise broken.pop()
        return build(*columns)

    loop._build = fail_once  # type: ignore[method-assign]
    start(loop)()
    (failure,) = [message for message in outbox.sent if isinstance(message, Failed)]
    assert (ints(failure.rows).tolist(), ints(failure.starts).tolist()) == ([0], [0])
    assert "no such luck" in failure.error
    assert tokens(outbox.sent) == [3, 4, 5]
    assert numbers[0] == [1, 2]


def test_a_step_whose_uploads_are_lost_ends_the_worker() -> None:
    class Loses(PositionRunner):
        def run(self, step: Step) -> Outcome:
            raise StateLost("gone")

    with pytest.raises(StateLost):
        start(loop_of(ListInbox([begin(1, 0, [7], credit=9, outputs=9)]), ListOutbox(), Loses()))()


def test_something_is_prepared_while_nobody_wants_anything_and_only_then() -> None:
    class Prepares(PositionRunner):
        left = 3
        waited: list[float]

        @property
        def prepares(self) -> bool:  # type: ignore[override]
            return self.left > 0

        def prepare(self) -> None:
            self.left -= 1

    class Quiet(ListInbox):
        def quiet(self, seconds: float) -> bool:
            waits.append(seconds)
            return super().quiet(seconds)

    waits: list[float] = []
    runner, outbox = Prepares(), ListOutbox()
    busy = [[begin(1, 0, [7], credit=2, outputs=3)], [], [], [], [begin(2, 1, [8], first_slot=9, outputs=1)]]
    start(loop_of(Quiet(*busy), outbox, runner))()
    assert tokens(outbox.sent) == [1, 2, 3, 1] and runner.left == 0
    assert waits == [QUIET, 0.0, 0.0], "the first waits until it is quiet, those behind it go on at once"
