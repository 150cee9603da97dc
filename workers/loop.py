"""The iteration loop: what one turn of it does.

Two identical threads take turns with a baton (overlap.py). A turn posts the thread's last iteration and launches its
next one, in one critical section (rule A): post, drain, apply, choose, build, launch. Between its turns a thread waits
for its launch and writes to the outbox; meanwhile the other one has its turn. So the post of iteration k precedes the
launch of k + 2, and the device always has the next iteration queued.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from aiollm.wire import messages
from aiollm.wire.columns import ints, pack
from aiollm.wire.messages import Alive, FromWorker, Header, Profile, Profiled, Reason, Stop, ToWorker, Update
from aiollm.workers import uploads
from aiollm.workers.constraints import Constraints
from aiollm.workers.decisions import Decisions
from aiollm.workers.flight import Flight, Outcome, Undrawn, failure, result
from aiollm.workers.profiling import Profiling
from aiollm.workers.rows import Rows
from aiollm.workers.staging import Staged, Staging, views
from aiollm.workers.step import Integers, Room, Step, columns, masking
from aiollm.workers.stream import Pending, Split, StateLost, Stream, failed

log = logging.getLogger(__name__)

QUIET = 0.5  # seconds without messages before something is prepared: who comes then waits for it to end, some 30 ms
BUILDING = 0.002  # seconds between looks at whether a grammar is built that all there is to do waits for
ALIVE = 0.2  # seconds between two signs of life meanwhile
SMALL_UPDATES = 64  # without chunks, applied in one iteration at most; bounds the time under the baton


class Runner(Protocol):
    """Runs on the stream; everything it needs is in the step, the masks or on the device."""

    def room(self, needs: Room, mixed: bool, top_n: int) -> Room:
        """How large the columns of a step should be that is launched next."""

    def run(self, step: Step) -> Outcome:
        """`begin` and `finish` at once."""

    def begin(self, step: Step) -> Any:
        """All but the drawing; the value is for `finish`."""

    def finish(self, step: Step, begun: Any, masks: Staged | None) -> Outcome:
        """The drawing, with masks as columns of `step.masking`."""

    @property
    def prepares(self) -> bool:
        """Whether there is work left that would make later steps faster."""

    def prepare(self) -> None:
        """Do a little of it; nothing else is under way."""


class Inbox(Protocol):
    def drain(self) -> Iterable[ToWorker]:
        """Whatever has arrived."""

    def quiet(self, seconds: float) -> bool:
        """Wait for something to arrive; True if nothing did within that time."""

    def wait(self) -> bool:
        """Block until something arrives; False if nothing ever will."""


class Outbox(Protocol):
    def put(self, message: FromWorker) -> None:
        """Queue a message; called with the baton."""

    def offer(self) -> None:
        """Write what of that can be written at once; called with the baton."""

    def flush(self) -> None:
        """Write what is queued, in order; called without the baton."""


class Loop:
    """State of the loop; every method is called with the baton."""

    def __init__(
        self, epoch: int, rows: int, inbox: Inbox, outbox: Outbox, stream: Stream, runner: Runner, staging: Staging,
        decisions: Decisions, constraints: Constraints | None = None, mask_staging: Staging | None = None,
    ) -> None:  # fmt: skip
        """`constraints` are those of a rank whose draws count; the other ranks draw what it drew."""
        self.epoch = epoch
        self.rows = Rows(rows)
        self.inbox = inbox
        self.outbox = outbox
        self.stream = stream
        self.runner = runner
        self.staging = staging
        self.decisions = decisions
        self.constraints = constraints
        self._mask_staging = mask_staging or Staging()
        self._undrawn: Undrawn | None = None
        self._held: list[int] = []
        """Rows for which the flight that was launched last does not draw."""
        self._fault: BaseException | None = None
        self.iteration = 0
        self.turns = 0
        self.applied = 0
        self.stopping = False
        self.in_flight = 0
        self._updates: deque[Update] = deque()
        self._uploads: list[Update] = []
        self._last_end = 0.0
        self._prepared = False
        self._shown = 0.0
        self._profiling: Profiling | None = None

    def turn(self, flight: Flight | None) -> Flight | None:
        """Post the thread's last iteration, then launch its next; None if there is nothing to launch now."""
        try:
            if flight is not None:
                self._post(flight)
                if self.in_flight:  # the device has work: clients come before the next launch, which takes 1 ms
                    self.outbox.offer()  # 0.01 ms for 1,000 rows
        finally:
            self._draw()  # the other thread waits for it
        self.turns += 1
        return self._lead() if self.decisions.leads else self._follow()

    def _lead(self) -> Flight | None:
        while True:
            self._drain()
            chunks = self._apply(self.applied + SMALL_UPDATES)
            waiting = self.constraints.unbuilt() if self.constraints is not None else []
            self._wait_for_grammars(waiting)
            decode, stalled = self.rows.runnable()
            launching = not self.stopping and (chunks is not None or len(decode) > 0)
            if launching or self.in_flight or self.stopping:
                self.decisions.write(
                    self.iteration, self.applied, launching, self.stopping, decode, waiting, self._held
                )
                return self._launch(chunks, decode, stalled) if launching else None
            if self._updates:
                continue  # more than SMALL_UPDATES had arrived
            if waiting:
                self._show_life()
            self.outbox.flush()  # nothing is in flight: the post of this turn must not wait for the next message
            if not (waiting and self.inbox.quiet(BUILDING)) and not self._wait():
                self.stopping = True

    def _wait_for_grammars(self, rows: Sequence[int]) -> None:
        """These rows, and no others, draw nothing yet."""
        self.rows.waiting.fill(False)
        self.rows.waiting[rows] = True

    def _hold(self, rows: Sequence[int]) -> None:
        """The flight that was launched last does not draw for these rows: they will compute their last token again."""
        held = set(self._held)
        new = [row for row in rows if row not in held]
        self.rows.position[new] -= 1
        self._held += new

    def _show_life(self) -> None:
        now = time.monotonic()
        if now - self._shown >= ALIVE:
            self.outbox.put(Alive())
            self._shown = now

    def _wait(self) -> bool:
        """Wait for messages, and prepare a little where none have come for a while; False if none ever will."""
        if self.runner.prepares and self.inbox.quiet(0.0 if self._prepared else QUIET):
            self.runner.prepare()
            self._prepared = True
            return True
        self._prepared = False
        return self.inbox.wait()

    def _follow(self) -> Flight | None:
        decision = self.decisions.read()
        self._hold(decision.held.tolist())
        while self.applied + len(self._updates) < decision.applied:
            self._drain()
            if self.applied + len(self._updates) < decision.applied and not self.inbox.wait():
                raise EOFError("the server went away")
        chunks = self._apply(decision.applied)
        self._wait_for_grammars(decision.waiting.tolist())
        decode, stalled = self.rows.runnable()
        self.decisions.check(decision, self.iteration, self.applied, decode)
        self.stopping = decision.stopping
        return self._launch(chunks, decode, stalled) if decision.launching else None

    def _drain(self) -> None:
        for message in self.inbox.drain():
            if isinstance(message, Update):
                self._updates.append(message)
            elif isinstance(message, Profile):
                self._profile(message)
            elif isinstance(message, Stop):
                self.stopping = True

    def _profile(self, asked: Profile) -> None:
        if asked.steps == 0:
            self._end_profile()
            return
        try:
            self._profiling = Profiling(self.iteration + asked.steps, asked.with_stack)
        except Exception as error:
            log.exception("a profile could not begin")
            self.outbox.put(Profiled(b"", f"the profile could not begin: {error}"))

    def _end_profile(self) -> None:
        profiling, self._profiling = self._profiling, None
        if profiling is not None:
            profiling.end(self._tell)

    def _tell(self, message: FromWorker) -> None:
        """From a thread without the baton, at once: nobody else might flush for a while."""
        self.outbox.put(message)
        self.outbox.flush()

    def _apply(self, until: int) -> Update | None:
        """Apply updates up to number `until`, and no further than the first with chunks, which is returned."""
        while self._updates and self.applied < until:
            update = self._updates.popleft()
            if update.number != self.applied + 1:
                raise ValueError(f"update {update.number} arrived after {self.applied}")
            self.rows.apply(update)
            if self.constraints is not None:
                self.constraints.apply(update)
            self._uploads.append(update)
            self.applied = update.number
            if update.chunk_rows:
                return update
        return None

    def _launch(self, chunks: Update | None, decode: Integers, stalled: Integers) -> Flight:
        rows, starts, counts = decode, self.rows.position[decode], np.ones(len(decode), np.int64)
        if chunks is not None:
            rows = np.concatenate([rows, ints(chunks.chunk_rows)])
            starts = np.concatenate([starts, ints(chunks.chunk_starts)])
            counts = np.concatenate([counts, ints(chunks.chunk_counts)])
        self.rows.launched(rows, starts + counts)
        sampled = np.flatnonzero(self.rows.decoding[rows] & ~self.rows.waiting[rows])
        reasons: dict[int, Reason] = {}
        self._held = []
        step, pending = self._build_and_launch(rows, starts, counts, sampled, len(decode), reasons)
        self.iteration += 1
        self.in_flight += 1
        who = rows[sampled]
        return Flight(
            self.iteration, self.turns, self.applied, step, rows, self.rows.generation[rows], starts, counts, sampled,
            self.rows.position[who] + 1 >= self.rows.limit[who], stalled, pending, reasons,
            np.flatnonzero(self.rows.waiting), self._held,
        )  # fmt: skip

    def _build_and_launch(
        self, rows: Integers, starts: Integers, counts: Integers, sampled: Integers, decodes: int,
        reasons: dict[int, Reason],
    ) -> tuple[Step | None, Pending]:  # fmt: skip
        """An error before the launch costs the rows of this step; what they would have uploaded goes with the next."""
        try:
            step = self._build(rows, starts, counts, sampled, decodes)
        except Exception as error:
            log.exception("a step could not be built")
            return None, failed(error)
        self._uploads = []
        masked = np.flatnonzero(self.rows.masked(rows[sampled]))
        pending: Pending
        if self.constraints is None or not len(masked):
            pending = self.stream.launch(lambda: self.runner.run(step))
        else:
            pending = Split(self.stream.launch(lambda: self.runner.begin(step)))
            self._undrawn = Undrawn(pending, step, rows[sampled], masked, reasons)
            if self._fault is not None:
                self.abandon(self._fault)
        self.staging.guard(pending)
        return step, pending

    def _draw(self) -> None:
        """Launch the drawing that the last launch lacks (rule J): its masks need the tokens of the iteration before,
        which were posted in this turn, or before it. The device computes the forward meanwhile."""
        undrawn, self._undrawn = self._undrawn, None
        if undrawn is None:
            return
        pending, step = undrawn.pending, undrawn.step
        try:
            masks = self._masks(undrawn)
            second = self.stream.launch(lambda: self.runner.finish(step, pending.outcome(), masks))
        except BaseException as error:  # a panic in Rust is no Exception, and the other thread waits for this launch
            log.exception("the masks of a step could not be made")
            pending.abandon(error)
            return
        pending.follow(second)
        self._mask_staging.guard(pending)

    def _masks(self, undrawn: Undrawn) -> Staged:
        """Who may draw what; a row that is idle by now draws in vain."""
        assert self.constraints is not None
        drawing = undrawn.masked[~self.rows.idle[undrawn.rows[undrawn.masked]]]
        staged = self._mask_staging.take(masking(undrawn.step.room.sampled, len(drawing), self.constraints.words))
        columns = views(staged.buffer, staged.places)
        lines = columns["lines"].numpy()
        lines.fill(-1)
        lines[drawing] = np.arange(len(drawing))
        masks = columns["masks"].numpy().reshape(len(drawing), self.constraints.words)
        filled = self.constraints.fill(undrawn.rows[drawing].tolist(), masks)
        undrawn.reasons.update(filled.failures)
        self._hold(filled.later)
        return staged

    def abandon(self, error: BaseException) -> None:
        """A thread has ended: the other one, which may hold the baton, must not wait for a drawing that it would have
        launched."""
        self._fault = error
        if (undrawn := self._undrawn) is not None:
            undrawn.pending.abandon(error)

    def _build(self, rows: Integers, starts: Integers, counts: Integers, sampled: Integers, decodes: int) -> Step:
        who, most = rows[sampled], int(counts.max())
        top_n = max(self.rows.top_n[who].tolist(), default=0)
        needs = Room(len(rows), int(counts.sum()), len(sampled))
        room, bias = self.runner.room(needs, most > 1, top_n), self.rows.bias(who)
        own = columns(rows, starts, counts, sampled, bias, room, self.rows.hold)
        try:
            brought = uploads.columns(self._uploads, bias)
        except Exception as error:
            raise StateLost(f"the updates of a step make no sense: {error}") from error
        return Step(
            updates=self._uploads,
            staged=self.staging.put(own | brought),
            room=room,
            sampled=needs.sampled,
            max_new=most,
            max_length=int((starts + counts).max()),
            top_n=top_n,
            prompts=self.rows.prompt_slices(rows, starts, counts, decodes),
            embeds=self.rows.embedded(who, np.cumsum(counts)[sampled] - 1),
        )

    def _post(self, flight: Flight) -> None:
        """Take an iteration's outcome: who stopped, what is published. Rows that were retired meanwhile are silent."""
        self.in_flight -= 1
        if self._profiling is not None and flight.iteration >= self._profiling.until:
            self._end_profile()
        pending = flight.pending
        idle = max(0.0, pending.began - self._last_end) if self._last_end and pending.began else 0.0
        idle += pending.ended - pending.began - pending.worked
        self._last_end = pending.ended or self._last_end
        header = Header(
            self.epoch, flight.iteration, flight.turn, flight.applied,
            int(pending.worked * 1e6), int(idle * 1e6), pack(flight.stalled),
            pack(flight.waiting), pack(flight.held),
        )  # fmt: skip
        if pending.error is not None:
            if not self.decisions.alone or isinstance(pending.error, StateLost):
                raise pending.error  # rule O: the other ranks did compute it; the group starts again
            self._post_failure(flight, header, pending.error)
            return
        outcome = pending.result
        assert isinstance(outcome, Outcome)
        rows, generations = flight.rows[flight.sampled], flight.generations[flight.sampled]
        alive = self.rows.alive(rows, generations)
        if flight.held:
            alive &= ~np.isin(rows, flight.held)
        hints = np.where(flight.at_limit, messages.HINT_LENGTH, messages.HINT_NONE).astype(np.uint8)
        hints[self.rows.stopped(rows, outcome.tokens)] = messages.HINT_STOP
        self.rows.idle[rows[alive & (hints != messages.HINT_NONE)]] = True
        if self.constraints is not None:
            goes_on = alive & (hints == messages.HINT_NONE)
            for at in np.flatnonzero(goes_on & self.rows.constrained[rows]).tolist():
                self.constraints.take(int(rows[at]), int(outcome.tokens[at]))
        self.outbox.put(result(flight, header, alive, hints))

    def _post_failure(self, flight: Flight, header: Header, error: BaseException) -> None:
        """A step that failed: its rows stop here, and the server learns what was not computed."""
        dead = self.rows.generation[flight.rows] == flight.generations
        self.rows.idle[flight.rows[dead]] = True
        self.outbox.put(failure(flight, header, error))
