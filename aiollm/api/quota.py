"""One API key of the server: what it may ask for, and what it has had.

Tokens come back at `tokens_per_minute`, up to those of one minute. A request needs one that is left, and takes those of
its prompt when it is submitted and those of its output when it ends; the debt that is then left is waited off. So in
the long run no key has more than it may, and no request is cut short.
"""

import math

from aiollm.api.errors import ApiError, invalid
from aiollm.api.key_file import Entry

LONGEST_RETRY = 120  # seconds; clients that wait longer have given up


class Key:
    """For one thread. Times are seconds of one clock."""

    __slots__ = ("name", "digest", "_entry", "_revoked", "_choices", "_tokens", "_since")

    def __init__(self, name: str, entry: Entry) -> None:
        self.name = name
        self.digest = bytes.fromhex(entry.sha256)
        self._entry = entry
        self._revoked = False
        self._choices = 0
        self._tokens = float(entry.tokens_per_minute or 0)
        self._since = 0.0

    def rule(self, name: str, entry: Entry) -> None:
        """Its name and limits from now on. What it has had counts against them."""
        before, rate = self._entry.tokens_per_minute, entry.tokens_per_minute
        if rate is not None:
            self._tokens = float(rate) if before is None else min(self._tokens, rate)
        self.name, self._entry = name, entry

    @property
    def min_priority(self) -> int:
        return self._entry.min_priority

    @property
    def namespace(self) -> str:
        """Its part of the prefix cache."""
        return "" if self._entry.shares_cache else self.name

    @property
    def cache_share(self) -> float | None:
        """Of the prefix cache that its part may keep; None is that of all keys."""
        return self._entry.cache_share

    def revoke(self) -> None:
        """It is taken back, also where a socket was opened with it."""
        self._revoked = True

    def check(self, choices: int, now: float, retry_after: int, param: str | None = None) -> None:
        """Raises ApiError where so many more choices, which the field `param` asks for, may not be submitted now;
        `retry_after` is for when others end."""
        if self._revoked:
            raise unauthorized("the API key is not one of this server's any more")
        most, rate = self._entry.max_requests, self._entry.tokens_per_minute
        if most is not None and choices > most:
            text = f"{choices} choices or inputs at once, and this API key may have {most} (max_requests)"
            raise invalid(param, f"{param}: {text}" if param else text)
        if most is not None and self._choices + choices > most:
            text = f"{self._choices} requests of this API key run or wait, and it may have {most} (max_requests)"
            raise _too_many(text, retry_after)
        if rate is not None:
            self._tokens = min(rate, self._tokens + (now - self._since) * rate / 60)
            self._since = now
            if self._tokens < 1:
                text = f"this API key has used up its tokens (tokens_per_minute is {rate})"
                raise _too_many(text, math.ceil((1 - self._tokens) * 60 / rate))

    def begin(self, choices: int, prompt_tokens: int) -> None:
        """They are submitted."""
        self._choices += choices
        self._tokens -= prompt_tokens  # means nothing where there is no limit

    def end(self, choices: int, output_tokens: int) -> None:
        """They have ended, in whatever way."""
        self._choices -= choices
        self._tokens -= output_tokens


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_many(message: str, retry_after: int) -> ApiError:
    headers = {"Retry-After": str(min(max(1, retry_after), LONGEST_RETRY))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
