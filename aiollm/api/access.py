"""What surrounds every handler: a request id, errors in our shape, a line in the access log, a count.

A line is a JSON object that is written when the request is over. It has no text of the client's but the path, without
its query, and a request id that is a decent one; the first of its prompts only where `log_prompts` is set.
"""

import logging
import re
import time
import uuid
from datetime import UTC, datetime

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm.api.errors import ApiError, allowed, described, internal
from aiollm.api.generation import GENERATION, Generation
from aiollm.api.keys import KEY
from aiollm.api.parts import METRICS
from aiollm.api.turns import STARTS
from aiollm.engine.engine import EngineBusy

log = logging.getLogger(__name__)
lines = logging.getLogger("aiollm.access")
"""Where the lines go, bare."""

PROBES = frozenset(
    {
        "/health",
        "/healthz",
        "/livez",
        "/liveness",
        "/ping",
        "/ready",
        "/readyz",
        "/readiness",
        "/startupz",
        "/metrics",
        "/token_load",
    }
)
CLIENT_GONE = 499  # in the log and the figures only
SWITCHED = 101
REFUSED = 401  # who guesses keys is told of, wherever it asks
REQUEST_ID = web.RequestKey("request_id", str)
UPGRADED = web.RequestKey("upgraded", bool)
"""Of a WebSocket, which ends when its client goes."""
GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@web.middleware
async def surround(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer for a handler that raised, and tell of every request once it is over. Where many come at once they begin a
    few at a time; probes do not wait for them."""
    began, probe = time.monotonic(), request.path.rstrip("/") in PROBES
    status = CLIENT_GONE
    try:
        if not probe:
            await request.app[STARTS].turn()
        response = await _answered(request, handler)
        status = response.status
        return response
    finally:
        status = SWITCHED if UPGRADED in request else status
        request.app[METRICS].responses.labels(status).inc()
        if not probe or status == REFUSED:
            tell(request, request.method, status, began, request.get(GENERATION))


def tell(http: web.Request, method: str, status: int, began: float, generation: Generation | None) -> None:
    """Write a line. `began` is of time.monotonic()."""
    if not lines.isEnabledFor(logging.INFO):
        return
    line: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "method": method,
        "path": http.rel_url.raw_path[:200],
        "status": status,
        "client_gone": status == CLIENT_GONE,
        "id": request_id(http),
        "key": http[KEY].name if KEY in http else None,
        "ms": round((time.monotonic() - began) * 1000, 3),
    }
    if generation is not None:
        line |= generation.summary
    lines.info(msgspec.json.encode(line).decode())


async def sign(http: web.Request, response: web.StreamResponse) -> None:
    """Signal: every response carries the id of its request."""
    response.headers["X-Request-Id"] = request_id(http)


def request_id(http: web.BaseRequest, own: str | None = None) -> str:
    """The client's own id if it is a decent one, in the header or else in the body (`own`), else one drawn here; the
    same at every call."""
    asked = http.headers.get("X-Request-Id", "")
    if REQUEST_ID not in http:
        http[REQUEST_ID] = asked if GOOD_ID.fullmatch(asked) else own or uuid.uuid4().hex
    return http[REQUEST_ID]


async def _answered(http: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(http)
    except ConnectionError:
        raise  # the client went away while we wrote
    except (ApiError, EngineBusy, web.HTTPException) as error:
        if isinstance(error, web.HTTPMethodNotAllowed) and http.method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": allowed(error)})
        return described(error, http.path).response()
    except Exception:
        log.exception("the handler of %s %s failed", http.method, request_id(http))
        return internal().response()
