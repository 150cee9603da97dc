"""Probes, models, version and figures: answered at once, whatever the engine does."""

import msgspec
from aiohttp import web

from aiollm import __version__
from aiollm.api.metrics import CONTENT_TYPE
from aiollm.api.parts import ENGINE, METRICS, PARTS, Parts
from aiollm.engine.engine import EngineBusy


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def health(http: web.Request) -> web.Response:
    """The event loop lives."""
    return _json({"status": "ok"})


async def ready(http: web.Request) -> web.Response:
    """200 while requests are served; else 503 with how far loading is, or why the engine stopped."""
    status = http.app[ENGINE].status
    body = {"status": status.state, "phase": status.phase, "progress": status.progress, "error": status.error}
    response = _json(body, 200 if status.state == "ready" else 503)
    if status.state != "ready":
        response.headers["Retry-After"] = "5"
    return response


async def not_yet(http: web.Request) -> web.Response:
    """Whatever needs a model, while it is still being found."""
    status = http.app[ENGINE].status
    raise EngineBusy(status.state, f"the model is not there yet: {status.phase}")


async def version(http: web.Request) -> web.Response:
    return _json({"version": __version__})


async def models(http: web.Request) -> web.Response:
    """Every name under which the model is served."""
    parts = http.app[PARTS]
    return _json({"object": "list", "data": [_model(parts, name) for name in parts.model.names]})


async def model(http: web.Request) -> web.Response:
    """One model; its id may contain slashes."""
    parts = http.app[PARTS]
    name = http.match_info["id"].removesuffix("/")
    return _json(_model(parts, parts.served_name(name)))


async def metrics(http: web.Request) -> web.Response:
    return web.Response(body=http.app[METRICS].text(), headers={"Content-Type": CONTENT_TYPE})


def _model(parts: Parts, name: str) -> dict[str, object]:
    """`max_model_len` is null until the model is loaded."""
    return {
        "id": name,
        "object": "model",
        "created": parts.model.created,
        "owned_by": "aiollm",
        "root": parts.model.root,
        "parent": None,
        "max_model_len": parts.context if parts.engine.core is not None else None,
    }
