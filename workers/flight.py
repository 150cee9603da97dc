"""A launched iteration until it is posted, and what the server is told of it then."""

from typing import NamedTuple

import numpy as np

from aiollm.wire.columns import pack, pack_floats
from aiollm.wire.messages import Failed, Header, PromptLogprobs, Reason, Result
from aiollm.workers.step import Integers, Step
from aiollm.workers.stream import Pending, Split

NO_HIDDEN = np.empty((0, 0), np.float32)


class Outcome(NamedTuple):
    """What a step left on the host; columns as in kernels.batch.Sampled, prompts as in Step.prompts."""

    tokens: np.ndarray  # [r] int64
    logprobs: np.ndarray  # [r] float32
    top_ids: np.ndarray  # [r, top_n] int64
    top_logprobs: np.ndarray  # [r, top_n] float32
    prompts: list[tuple[np.ndarray, ...]]  # what the op `logprobs` gives
    hidden: np.ndarray = NO_HIDDEN  # [embeds, hidden] float32, as in Step.embeds


class Flight(NamedTuple):
    """A launched iteration, until it is posted."""

    iteration: int
    turn: int
    applied: int
    step: Step | None
    """None where it could not be built: rule M."""
    rows: Integers
    generations: Integers
    starts: Integers
    counts: Integers
    sampled: Integers
    at_limit: np.ndarray
    stalled: Integers
    pending: Pending
    reasons: dict[int, Reason]
    """Rows that could draw nothing, known once they were to."""
    waiting: Integers
    held: list[int]
    """Rows that draw later what they were to draw here, known once they were to."""


class Undrawn(NamedTuple):
    """A launch whose drawing waits for masks of its constrained sequences, `masked` of the sampled ones."""

    pending: Split
    step: Step
    rows: Integers
    masked: Integers
    reasons: dict[int, Reason]


def result(flight: Flight, header: Header, alive: np.ndarray, hints: np.ndarray) -> Result:
    """What the sampled sequences drew whose rows are `alive`, with a hint for each."""
    step, outcome = flight.step, flight.pending.result
    assert step is not None and isinstance(outcome, Outcome)
    rows, generations = flight.rows[flight.sampled], flight.generations[flight.sampled]
    hidden_at, hidden = _hidden(step, outcome, alive) if step.embeds else (b"", b"")
    return Result(
        header=header,
        hidden_at=hidden_at,
        hidden=hidden,
        rows=pack(rows[alive]),
        generations=pack(generations[alive]),
        tokens=pack(outcome.tokens[alive]),
        logprobs=pack_floats(outcome.logprobs[alive]),
        hints=hints[alive].tobytes(),
        top=max(0, step.top_n),
        top_ids=pack(outcome.top_ids[alive]),
        top_logprobs=pack_floats(outcome.top_logprobs[alive]),
        prompts=[
            PromptLogprobs(p.row, p.generation, p.start, pack_floats(own), pack(ranks), pack(ids), pack_floats(values))
            for p, (own, ranks, ids, values) in zip(step.prompts, outcome.prompts, strict=True)
        ],
        reasons=flight.reasons,
    )


def failure(flight: Flight, header: Header, error: BaseException) -> Failed:
    """What was not computed."""
    return Failed(
        header=header,
        rows=pack(flight.rows),
        generations=pack(flight.generations),
        starts=pack(flight.starts),
        counts=pack(flight.counts),
        error=f"{type(error).__name__}: {error}",
    )


def _hidden(step: Step, outcome: Outcome, alive: np.ndarray) -> tuple[bytes, bytes]:
    """Hidden states of the rows that are alive, and where these stand among them."""
    at = np.array([embed.sequence for embed in step.embeds])
    return pack((np.cumsum(alive) - 1)[at[alive[at]]]), pack_floats(outcome.hidden[alive[at]])
