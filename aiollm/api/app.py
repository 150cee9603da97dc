"""The HTTP face put together: routes, and the server that listens."""

import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm.api import chat, completions, embeddings, invocations, native, openapi, score, status, tokenize, ws
from aiollm.api.access import sign, surround
from aiollm.api.answer import RUNNING, cancel
from aiollm.api.connection import BACKLOG, Entrance, Site
from aiollm.api.deep import DEEP, DeepProbe
from aiollm.api.keys import KEYS, OPEN, Keys, guard
from aiollm.api.metrics import Metrics
from aiollm.api.parts import ENGINE, METRICS, PARTS, ModelInfo, Settings, make_parts
from aiollm.api.static import PAGE
from aiollm.api.stream import OUTBOX, write_all
from aiollm.api.turns import STARTS, Starts, Turns
from aiollm.engine.engine import Engine
from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer

KEEP_ALIVE_SECONDS = 75  # idle connections, and half-sent headers
LINGERING_SECONDS = 2  # for reading the rest of a refused body, so that the client sees the answer
PROBES = frozenset({status.health, status.ready, status.metrics})
"""What can be told without a model."""
GET: dict[str, Handler] = {
    "/health": status.health,
    "/healthz": status.health,
    "/liveness": status.health,
    "/livez": status.health,
    "/ping": status.health,
    "/ready": status.ready,
    "/readyz": status.ready,
    "/readiness": status.ready,
    "/startupz": status.ready,
    "/metrics": status.metrics,
    "/version": status.version,
    "/server_info": status.server_info,
    "/openapi.json": openapi.openapi,
    "/v1/models": status.models,
    "/v1/chat/ws": ws.chat_socket,
    "/v1/models/{id:.+}": status.model,
    "/get_model_name": native.model_name,
    "/token_load": native.token_load,
    "/tokens": native.tokens,
}
POST: dict[str, Handler] = {
    "/v1/chat/completions": chat.chat_completions,
    "/v1/chat/ws": ws.chat_socket,
    "/v1/completions": completions.completions,
    "/v1/embeddings": embeddings.embeddings,
    "/": native.either,
    "/generate": native.generate,
    "/generate_stream": native.generate_stream,
    "/get_model_name": native.model_name,
    "/get_score": score.get_score,
    "/tokenize": tokenize.tokenize,
    "/v1/tokenize": tokenize.tokenize,
    "/detokenize": tokenize.detokenize,
    "/v1/detokenize": tokenize.detokenize,
    "/v1/requests/{id}/cancel": cancel,
    "/invocations": invocations.invocations,
    "/liveness": status.health,
    "/readiness": status.ready,
    "/tokens": native.tokens,
}
ROUTES = {"GET": {**GET, "/": PAGE["/"]}, "POST": POST}
"""What is for everybody to know of, but for the files of the page."""


def make_app(
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    model: ModelInfo,
    generation_config: Mapping[str, Any],
    settings: Settings = Settings(),  # noqa: B008  a NamedTuple is immutable
    keys: Keys = Keys(),  # noqa: B008  nor does this one change
) -> web.Application:
    """The application over an engine that may still be loading: that of `make_parts`, whose arguments come first."""
    parts = make_parts(engine, tokenizer, template, model, generation_config, settings)
    app = _application(engine, parts.metrics, keys)
    app[PARTS] = parts
    app[DEEP] = DeepProbe(parts)
    app[STARTS] = parts.starts
    app[OUTBOX] = Turns(write_all)
    app[RUNNING] = {}
    openapi.describe(app, ROUTES)
    app[ws.SOCKETS] = set()
    app.on_shutdown.append(ws.shut_sockets)
    app.cleanup_ctx.append(_watch_lag)
    _route(app, GET, POST)
    return app


def make_door(engine: Engine, keys: Keys = Keys()) -> web.Application:  # noqa: B008
    """The application while the model is found or downloaded, and there is no tokenizer yet.

    Probes are answered; all else is refused with 503 and how far it is.
    """
    app = _application(engine, Metrics(engine), keys)
    app[STARTS] = Starts()
    _route(app, *({path: handler for path, handler in table.items() if handler in PROBES} for table in (GET, POST)))
    app.router.add_route("*", "/{path:.*}", status.not_yet)
    return app


def _route(app: web.Application, get: Mapping[str, Handler], post: Mapping[str, Handler]) -> None:
    """Add routes; a slash at the end of a path changes nothing."""
    for add, table in ((app.router.add_get, get), (app.router.add_post, post)):
        for path, handler in table.items():
            for spelling in {path, path.rstrip("/") + "/"}:
                add(spelling, handler)


def _application(engine: Engine, metrics: Metrics, keys: Keys) -> web.Application:
    """What every application of ours has around its routes."""
    app = web.Application(middlewares=[surround, guard])
    app[ENGINE] = engine
    app[METRICS] = metrics
    app[KEYS] = keys
    # The page holds no secret, and has to be there to ask for a key. Figures are no probe: they tell how much the
    # server is used, and Prometheus can show a key.
    app[OPEN] = frozenset({status.health, status.ready, *PAGE.values()})
    app.on_response_prepare.append(sign)
    for path, handler in PAGE.items():
        app.router.add_get(path, handler)
    return app


async def serve(
    app: web.Application,
    host: str,
    port: int,
    sock: socket.socket | None = None,
    keep_alive: float = KEEP_ALIVE_SECONDS,
    tls: ssl.SSLContext | None = None,
) -> Entrance:
    """Listen on (host, port), or on a socket that is bound already; `cleanup()` of the entrance ends it."""
    entrance = Entrance()
    await entrance.setup()
    await entrance.lead_to(app)
    site = Site(
        entrance,
        sock or socket.create_server((host, port), backlog=BACKLOG),
        tls,
        access_log=None,
        keepalive_timeout=keep_alive,
        lingering_time=LINGERING_SECONDS,
        auto_decompress=False,
    )
    await site.start()
    return entrance


async def _watch_lag(app: web.Application) -> AsyncIterator[None]:
    with app[PARTS].metrics.watching_lag():
        yield
