"""How fast things go: the prompt tokens that an iteration may take, and how soon a full queue has room again."""

import math
from collections import deque

STEP = 256  # tokens between the sizes to which workers pad long iterations (workers/sizes.py)
PIECE = 3 * STEP  # prompt tokens with which an iteration is bound by arithmetic: more get no more done in a second
LEAST_CHUNK = 64  # prompt tokens; fewer would hardly make an iteration shorter
LONGEST_RETRY = 120  # seconds; clients of OpenAI's interface ignore longer ones
REMEMBERED = 60  # seconds of draining; a quiet night says nothing about a rush
FIRST_RETRY = 5  # while nothing was measured


class ChunkBudget:
    """Prompt tokens of one iteration such that running streams wait at most `target` seconds for it; 0 is no target.

    The duration of an iteration is taken to be that of decoding alone and so much for each prompt token; both are
    learnt from result headers.
    """

    def __init__(self, most: int, target: float) -> None:
        self.most, self.target = most, target
        self.decode_seconds = 0.0
        self.token_seconds = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        """An iteration with so many prompt tokens took so long."""
        if seconds <= 0:
            return
        if not tokens:
            self.decode_seconds += (0.1 if self.decode_seconds else 1.0) * (seconds - self.decode_seconds)
        elif tokens >= LEAST_CHUNK // 2:  # fewer say nothing about a token
            each = max(0.0, seconds - self.decode_seconds) / tokens
            self.token_seconds += (0.2 if self.token_seconds else 1.0) * (each - self.token_seconds)

    def tokens(self, streams: int) -> int:
        """The budget while `streams` rows decode.

        Beside few streams prompts come in pieces that are just large enough, so that more of the iterations, which read
        the weights anyway, compute some; beside many, whose own tokens make iterations long, in larger ones, so that
        the queue drains. One H100, 8B: 100 clients with prompts of 1,024 tokens get 26.7 requests/s in iterations of
        1,024 tokens with those of the streams, 25.6 of 1,280 or 2,048; ShareGPT lengths in 1,000 streams get 53.7 with
        pieces of 1,024 and 54.4 with 2,048; prompts alone 38.1 and 40.0 thousand tokens/s.
        """
        budget = self.most
        if streams:
            budget = min(budget, PIECE + 2 * streams)
            if self.target and self.token_seconds:
                room = (self.target - self.decode_seconds) / self.token_seconds
                budget = min(budget, max(LEAST_CHUNK, int(room)))
        return budget if not streams or budget < PIECE else _filling(streams + budget) - streams


def _filling(tokens: int) -> int:
    """The largest size of the workers that so many tokens fill up."""
    step = STEP if tokens >= 4 * STEP else STEP // 2
    return tokens // step * step


class Drain:
    """The rate at which requests leave the queue to run."""

    def __init__(self) -> None:
        self._left: deque[float] = deque(maxlen=64)

    def left(self, now: float) -> None:
        self._left.append(now)

    def rate(self, now: float) -> float:
        """Requests a second, over the latest 64 of the last minute; 0 where nothing is known."""
        while self._left and now - self._left[0] > REMEMBERED:
            self._left.popleft()
        if len(self._left) < 2:
            return 0.0
        return (len(self._left) - 1) / max(1e-3, now - self._left[0])

    def retry_after(self, now: float, excess: int) -> int:
        """Whole seconds until `excess` requests will have left."""
        rate = self.rate(now)
        if not rate:
            return FIRST_RETRY
        return min(LONGEST_RETRY, max(1, math.ceil(excess / rate)))
