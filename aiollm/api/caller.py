"""Who asks, and for how long they are ready to wait."""

from typing import NamedTuple

from aiohttp import web

from aiollm.api.errors import invalid
from aiollm.api.keys import KEY
from aiollm.api.quota import Key
from aiollm.engine.share import SEPARATOR

TIMEOUT = "X-Request-Timeout"
LONGEST = 86_400


class Caller(NamedTuple):
    key: Key | None = None
    """None where none is asked for."""
    patience: float | None = None
    """Seconds from arrival within which the request must begin; None is as long as the server likes."""

    @property
    def name(self) -> str:
        """That of the API key; empty where there is none."""
        return self.key.name if self.key is not None else ""

    def namespace(self, salt: str | None) -> str:
        """The part of the prefix cache for requests with this `cache_salt`. No salt leads to another key's: names have
        no zero byte."""
        own = self.key.namespace if self.key is not None else ""
        return f"{own}{SEPARATOR}{salt or ''}" if own or salt else ""

    def priority(self, asked: int | None) -> int:
        """The priority of requests that ask for this one."""
        return max(asked or 0, self.key.min_priority) if self.key is not None else asked or 0


NOBODY = Caller()


def caller(http: web.Request) -> Caller:
    """Raises ApiError where the header X-Request-Timeout is no number of seconds."""
    text = http.headers.get(TIMEOUT)
    return Caller(http.get(KEY), None if text is None else _seconds(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise invalid(TIMEOUT, f"{TIMEOUT}: {text[:40]} is not a number of seconds above 0 and at most {LONGEST}")
    return seconds
