"""Probes, models, version, settings and figures: answered at once, whatever the engine does."""

import platform
from importlib.metadata import version as installed

import msgspec
from aiohttp import web

from aiollm import __version__
from aiollm.api.deep import DEEP
from aiollm.api.metrics import CONTENT_TYPE
from aiollm.api.parts import ENGINE, METRICS, PARTS, Parts
from aiollm.engine.engine import EngineBusy

# Read once, from files. Torch is the workers'.
VERSIONS = {"python": platform.python_version()} | {
    name: installed(name) for name in ("aiohttp", "msgspec", "tokenizers", "torch")
}


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def health(http: web.Request) -> web.Response:
    """The event loop lives; with `deep=1` in the query the model gave a token too."""
    if http.query.get("deep") == "1":
        await (http.app[DEEP].check() if DEEP in http.app else not_yet(http))
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


async def server_info(http: web.Request) -> web.Response:
    """What is served, with which versions, settings and limits, and what the device's memory holds, in bytes.

    No keys, and no paths. What the workers tell is null until they are ready.
    """
    parts = http.app[PARTS]
    engine, settings, ready = parts.engine, parts.settings, parts.engine.ready
    limits = engine.core.limits if engine.core is not None else None
    info = {
        "status": engine.status.state,
        "version": __version__,
        "versions": VERSIONS,
        "model": {
            "names": parts.model.names,
            "root": parts.model.root,
            "architecture": ready and ready.architecture,
            "data_type": ready and ready.data_type,
            "vocabulary": ready and parts.vocabulary,
            "scores": ready and ready.scores,
        },
        "limits": {
            "max_model_len": limits and limits.longest,
            "running_requests": engine.settings.rows,
            "waiting_requests": engine.settings.queue,
            "kv_tokens": ready and ready.slots,
            "n": settings.max_n,
            "choices": settings.max_choices,
            "body_bytes": limits and parts.body_limit,
            "body_seconds": settings.body_timeout,
        },
        "settings": dict(settings.shown),
        "memory": dict(ready.budget) if ready else None,
    }
    return _json(info)


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
