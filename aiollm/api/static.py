"""The chat page: a fixed table of files, read once, under a policy that lets nothing else in."""

import hashlib
from importlib import resources

from aiohttp import web
from aiohttp.typedefs import Handler

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_routes() -> dict[str, Handler]:
    """Path and handler of every file of the page; no other path reaches a file."""
    found: dict[str, Handler] = {}
    for file in (resources.files("aiollm.api") / "page").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            found[path] = _handler(file.read_bytes(), f"{kind}; charset=utf-8")
    return found


def _handler(data: bytes, kind: str) -> Handler:
    tag = hashlib.sha256(data).hexdigest()[:32]
    headers = {
        "Content-Type": kind,
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # kept, and asked for again by its tag: a new version is seen at once
        "ETag": f'"{tag}"',
    }

    async def serve(http: web.Request) -> web.Response:
        if any(known.value in (tag, "*") for known in http.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=data, headers=headers)

    return serve


PAGE = page_routes()
