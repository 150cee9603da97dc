"""What the operator may do, on a Unix socket that only this user opens; no route of it is on the public listener.

GET  /state       how the server is, in figures
POST /drain       refuse new requests with 503, /ready too; what runs or waits goes on
POST /resume      take requests again
POST /flush       empty the prefix cache, but for what running requests stand on
POST /log_level   {"level": "debug"}, until the next one or SIGHUP
POST /trace       {"seconds": 10}: what the device does meanwhile, as `--trace` writes it
POST /profile     {"steps": 20, "with_stack": false}: torch.profiler over so many iterations of rank 0's worker
"""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from aiohttp import web
from msgspec import Meta

from aiollm.api.access import sign, surround
from aiollm.api.decoding import decode
from aiollm.api.errors import ApiError
from aiollm.api.metrics import Metrics
from aiollm.api.parts import ENGINE, METRICS
from aiollm.api.turns import STARTS, Starts
from aiollm.engine.engine import Engine


class Traced(Protocol):
    """The workers, as far as they can be traced and profiled."""

    @property
    def tracing(self) -> bool: ...

    def trace(self, path: str, rows: Mapping[int, int]) -> None:
        """Begin a trace; `rows` have the generation of each row that the workers know."""

    def end_trace(self) -> None: ...

    @property
    def profiling(self) -> bool: ...

    def profile(self, steps: int, with_stack: bool) -> asyncio.Future[bytes]:
        """Begin a profile, which ends by itself after so many iterations; RuntimeError says why there is none."""

    def end_profile(self) -> None: ...


class LogLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"]


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: Annotated[float, Meta(gt=0, le=60)] = 10.0


class Steps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    steps: Annotated[int, Meta(ge=1, le=200)] = 20
    with_stack: bool = False


PROFILE_SECONDS = 60.0
"""For the iterations of a profile, and as much again for writing it."""
WORKERS: web.AppKey[Traced] = web.AppKey("workers", Traced)
ENDING: web.AppKey[asyncio.Event] = web.AppKey("ending", asyncio.Event)
"""Set when the server ends: no answer waits any longer."""
_LEVEL, _SPAN = msgspec.json.Decoder(LogLevel), msgspec.json.Decoder(Span)
_STEPS = msgspec.json.Decoder(Steps)


def make_admin(engine: Engine, metrics: Metrics, workers: Traced) -> web.Application:
    app = web.Application(middlewares=[surround])
    app[ENGINE], app[METRICS], app[WORKERS], app[ENDING] = engine, metrics, workers, asyncio.Event()
    app[STARTS] = Starts()
    app.on_response_prepare.append(sign)
    app.on_shutdown.append(_end)
    app.router.add_get("/state", state)
    for path, handler in (
        ("/drain", drain), ("/resume", resume), ("/flush", flush), ("/log_level", log_level), ("/trace", trace),
        ("/profile", profile),
    ):  # fmt: skip
        app.router.add_post(path, handler)
    return app


async def _end(app: web.Application) -> None:
    app[ENDING].set()


async def state(http: web.Request) -> web.Response:
    return _json(_state(http))


async def drain(http: web.Request) -> web.Response:
    engine = http.app[ENGINE]
    if not engine.hold():
        raise _conflict(f"the server is {engine.state}")
    return _json(_state(http))


async def resume(http: web.Request) -> web.Response:
    engine = http.app[ENGINE]
    if not engine.resume():
        raise _conflict(f"the server is {engine.state}, and nobody drains it")
    return _json(_state(http))


async def flush(http: web.Request) -> web.Response:
    return _json({"tokens": await http.app[ENGINE].flush()})


async def log_level(http: web.Request) -> web.Response:
    level = decode(_LEVEL, await http.read()).level
    logging.getLogger().setLevel(level.upper())
    return _json({"level": level})


async def trace(http: web.Request) -> web.Response:
    """The answer is the trace itself, so that no path has to be trusted."""
    seconds = decode(_SPAN, await http.read() or b"{}").seconds
    workers, core = http.app[WORKERS], http.app[ENGINE].core
    if workers.tracing:
        raise _conflict("a trace is being written already")
    with tempfile.TemporaryDirectory(prefix="aiollm-trace-") as folder:
        path = Path(folder) / "trace.json"
        workers.trace(str(path), {row.index: row.generation for row in core.ledger.running.values()} if core else {})
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(http.app[ENDING].wait(), seconds)
        finally:
            workers.end_trace()
        data = await asyncio.to_thread(path.read_bytes)
    return web.Response(body=data, content_type="application/json")


async def profile(http: web.Request) -> web.Response:
    """The answer is the profile itself, gzipped. A server without enough work answers with what there was."""
    asked = decode(_STEPS, await http.read() or b"{}")
    workers = http.app[WORKERS]
    if http.app[ENGINE].workers is None:
        raise ApiError(503, "there is no worker yet", code="loading", headers={"Retry-After": "5"})
    if workers.profiling:
        raise _conflict("a profile is being made already")
    found = workers.profile(asked.steps, asked.with_stack)
    ending = asyncio.ensure_future(http.app[ENDING].wait())
    try:
        await asyncio.wait((found, ending), timeout=PROFILE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        workers.end_profile()
        async with asyncio.timeout(PROFILE_SECONDS):
            data = await asyncio.shield(found)
    except (RuntimeError, TimeoutError) as error:
        reason = str(error) or f"the worker did not answer within {PROFILE_SECONDS:g} s"
        raise ApiError(500, f"there is no profile: {reason}", code="no_profile") from error
    finally:
        ending.cancel()
        if not found.done():
            found.cancel()
            workers.end_profile()
    return web.Response(body=data, content_type="application/gzip")


def _state(http: web.Request) -> dict[str, Any]:
    engine = http.app[ENGINE]
    found: dict[str, Any] = {
        **engine.status._asdict(),
        "log_level": logging.getLevelName(logging.getLogger().level).lower(),
        "tracing": http.app[WORKERS].tracing,
        "profiling": http.app[WORKERS].profiling,
    }
    if (core := engine.core) is not None:
        index = core.ledger.index
        found |= {
            "epoch": core.epoch,
            "running": len(core.ledger.running),
            "waiting": len(core.waiting),
            "slots": {
                "all": core.limits.slots,
                "free": core.ledger.pool.free,
                "cached": index.total,
                "cached_in_use": index.pinned,
            },
        }
    return found


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value) + b"\n", content_type="application/json")


def _conflict(message: str) -> ApiError:
    return ApiError(409, message, code="conflict")
