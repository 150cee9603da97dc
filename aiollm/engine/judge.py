"""Reads the columns of a result and decides, token by token, whether a request ends (rule G)."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np

from aiollm.engine.request import Finish, PromptToken, Request, Token
from aiollm.engine.rows import Row, Table
from aiollm.wire.columns import floats, ints
from aiollm.wire.messages import PromptLogprobs, Reason, Result

log = logging.getLogger(__name__)
Top = tuple[tuple[int, float], ...]
NOT_FINITE = Finish("numerical_error", error="the model produced logits that are not finite")
UNWRITTEN = Finish("error", error="the output of this request could not be written")


class Judge:
    """The drawn tokens of one result. `rows` are their rows, `alive` says which of these still live the life that the
    token is for, and `taken` how many tokens somebody took, once `ends` is through."""

    def __init__(self, result: Result, running: Sequence[Row | None], table: Table) -> None:
        self.rows = ints(result.rows)
        self.alive = table.active[self.rows] & (table.generation[self.rows] == ints(result.generations))
        self.taken = int(np.count_nonzero(self.alive))
        self._result, self._running = result, running

    def ends(self) -> Iterator[tuple[Row, Finish]]:
        """Append all tokens to their requests, in order. A row that ends by its token is given out, to be retired
        before the next token is looked at, with how it ends."""
        result, running, reasons = self._result, self._running, self._result.reasons
        self._take_hidden()
        ids, logprobs = ints(result.tokens).tolist(), floats(result.logprobs).tolist()
        columns = (self.rows.tolist(), self.alive.tolist(), ids, logprobs, _tops(result, len(ids)))
        for index, alive, id, logprob, top in zip(*columns, strict=True):
            row = running[index]
            if row is None or not alive:
                self.taken -= alive  # it ended by a token before this one
                continue
            request = row.request
            if id < 0:
                yield row, _undrawn(reasons.get(index))
                continue
            sampling, output = request.sampling, request.output
            output.append(id)
            young = len(output) <= sampling.min_tokens and not sampling.constraints
            ends = id in sampling.stop_ids and not young
            more = len(top) > sampling.top_logprobs
            wanted = top[: max(0, sampling.top_logprobs)] if more else top
            try:
                stop = request.sink.token(Token(id, logprob, wanted, ends))
            except Exception:
                log.exception("the output of request %s failed", request.id)
                yield row, UNWRITTEN
                continue
            if ends:
                yield row, Finish("stop", None if id in request.eos_ids else id)
            elif stop is not None:
                yield row, Finish("stop", stop)
            elif len(output) >= sampling.max_tokens:
                yield row, Finish("length")

    def _take_hidden(self) -> None:
        """Give hidden states to the requests that asked for them, before their tokens come."""
        places = ints(self._result.hidden_at)
        if not len(places):
            return
        for at, hidden in zip(places.tolist(), floats(self._result.hidden).reshape(len(places), -1), strict=True):
            row = self._running[self.rows[at]]
            if row is not None and self.alive[at]:
                row.request.hidden = hidden


def _undrawn(reason: Reason | None) -> Finish:
    """How a row ends that could draw nothing."""
    return NOT_FINITE if reason is None else Finish("constraints" if reason.asked else "error", error=reason.text)


def _tops(result: Result, count: int) -> Iterable[Top]:
    """The alternatives of each token."""
    if not result.top:
        return repeat((), count)
    pairs = zip(ints(result.top_ids).tolist(), floats(result.top_logprobs).tolist(), strict=True)
    return zip(*[pairs] * result.top, strict=True)


def prompt_logprobs(request: Request, part: PromptLogprobs) -> Finish | None:
    """Hand over logprobs of prompt tokens that the request has not seen yet; how the request ends, if it does."""
    logprobs, ranks = floats(part.logprobs).tolist(), ints(part.ranks).tolist()
    ids, values = ints(part.top_ids).tolist(), floats(part.top_logprobs).tolist()
    top = len(ids) // max(1, len(logprobs))
    pairs = list(zip(ids, values, strict=True))
    tokens = [
        PromptToken(part.start + i, logprobs[i], ranks[i], tuple(pairs[i * top : i * top + top]))
        for i in range(max(0, request.prompt_seen - part.start), len(logprobs))
    ]
    request.prompt_seen += len(tokens)
    try:
        if tokens:
            request.sink.prompt_tokens(tokens)
    except Exception:
        log.exception("the output of request %s failed", request.id)
        return UNWRITTEN
    return None
