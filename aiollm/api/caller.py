"""Who asks, and for how long they are ready to wait."""

from typing import NamedTuple

from aiohttp import web

from aiollm.api.errors import invalid
from aiollm.api.keys import KEY

TIMEOUT = "X-Request-Timeout"
LONGEST = 86_400


class Caller(NamedTuple):
    key: str = ""
    """The number of the API key; empty where none is asked for."""
    patience: float | None = None
    """Seconds from arrival within which the request must begin; None is as long as the server likes."""


NOBODY = Caller()


def caller(http: web.Request) -> Caller:
    """Raises ApiError where the header X-Request-Timeout is no number of seconds."""
    text = http.headers.get(TIMEOUT)
    return Caller(http.get(KEY, ""), None if text is None else _seconds(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST:
        raise invalid(TIMEOUT, f"{TIMEOUT}: {text[:40]} is not a number of seconds above 0 and at most {LONGEST}")
    return seconds
