"""Reads the columns of a result and decides, token by token, whether a request ends (rule G)."""

import logging

from aiollm.engine.request import Finish, PromptToken, Request, Token
from aiollm.wire.columns import floats, ints
from aiollm.wire.messages import PromptLogprobs, Result

log = logging.getLogger(__name__)
Top = tuple[tuple[int, float], ...]
UNWRITTEN = Finish("error", error="the output of this request could not be written")


class Judge:
    """One result, unpacked. `rows` holds (row, generation) of each drawn token, in order."""

    def __init__(self, result: Result) -> None:
        self.rows = list(zip(ints(result.rows).tolist(), ints(result.generations).tolist(), strict=True))
        self._tokens = ints(result.tokens).tolist()
        self._logprobs = floats(result.logprobs).tolist()
        self._top = result.top
        self._top_ids = ints(result.top_ids).tolist()
        self._top_logprobs = floats(result.top_logprobs).tolist()

    def token(self, request: Request, at: int) -> Finish | None:
        """Append token `at` to its request; how the request ends, if it does."""
        id = self._tokens[at]
        if id < 0:
            return Finish("error", error="the model produced logits that are not finite")
        sampling, output = request.sampling, request.output
        output.append(id)
        top: Top = ()
        if sampling.top_logprobs > 0:
            begin = at * self._top
            end = begin + min(self._top, sampling.top_logprobs)
            top = tuple(zip(self._top_ids[begin:end], self._top_logprobs[begin:end], strict=True))
        ends = id in sampling.stop_ids and len(output) > sampling.min_tokens
        try:
            stop = request.sink.token(Token(id, self._logprobs[at], top, ends))
        except Exception:
            log.exception("the output of request %s failed", request.id)
            return UNWRITTEN
        if ends:
            return Finish("stop", None if id in request.eos_ids else id)
        if stop is not None:
            return Finish("stop", stop)
        if len(output) >= sampling.max_tokens:
            return Finish("length")
        return None

    def prompt_logprobs(self, request: Request, part: PromptLogprobs) -> Finish | None:
        """Hand over logprobs of prompt tokens that the request has not seen yet; how the request ends, if it does."""
        logprobs = floats(part.logprobs).tolist()
        ids, values = ints(part.top_ids).tolist(), floats(part.top_logprobs).tolist()
        top = len(ids) // max(1, len(logprobs))
        pairs = list(zip(ids, values, strict=True))
        tokens = [
            PromptToken(part.start + i, logprobs[i], tuple(pairs[i * top : i * top + top]))
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
