"""API keys: who may ask for anything but the probes and the files of the chat page.

A key is shown as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Browsers cannot set headers of a WebSocket, so there
it may also be one of the subprotocols offered: `aiollm.key.` and the key in base64url without padding, beside `aiollm`,
which is the one that the server takes up. Queries are not looked at: addresses end up in histories and logs.
"""

import hmac
from base64 import b64decode
from collections.abc import Iterable
from hashlib import sha256

from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm.api.errors import ApiError

SUBPROTOCOL = "aiollm"
KEY_SUBPROTOCOL = "aiollm.key."


class Keys:
    """The keys of a server, as digests; without any, everybody is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = list(dict.fromkeys(sha256(key.encode()).digest() for key in keys))

    def __len__(self) -> int:
        return len(self._digests)

    def number(self, key: bytes) -> int:
        """Which one of them it is, from 1 on; 0 is none. The time it takes says nothing about them: digests, all of
        them, to their ends."""
        digest = sha256(key).digest()
        return sum([at * hmac.compare_digest(own, digest) for at, own in enumerate(self._digests, 1)])


KEYS = web.AppKey("keys", Keys)
KEY = web.RequestKey("key", str)
"""The number of the key that a request has shown."""
OPEN: web.AppKey[frozenset[Handler]] = web.AppKey("open", frozenset)
"""Handlers that answer without a key."""


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request through that shows a key, or needs none. Raises ApiError (401)."""
    keys = request.app[KEYS]
    if keys and request.match_info.handler not in request.app[OPEN]:
        shown = shown_keys(request)
        if not shown:
            raise _unauthorized("this server asks for an API key: send it as `Authorization: Bearer KEY`")
        number = keys.number(shown.pop()) if len(shown) == 1 else 0
        if not number:
            raise _unauthorized("the API key is not one of this server's")
        request[KEY] = str(number)
    return await handler(request)


def shown_keys(http: web.Request) -> set[bytes]:
    """Every key that a request shows; an empty one does not count."""
    shown = {value.strip() for value in http.headers.getall("X-Api-Key", ())}
    for value in http.headers.getall("Authorization", ()):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            shown.add(key.strip())
    keys = {key.encode(errors="surrogateescape") for key in shown}
    for protocol in subprotocols(http):
        if protocol.startswith(KEY_SUBPROTOCOL):
            keys.add(_decoded(protocol.removeprefix(KEY_SUBPROTOCOL)))
    return keys - {b""}


def subprotocols(http: web.Request) -> list[str]:
    """What a client offers to speak over its WebSocket."""
    offered = ",".join(http.headers.getall("Sec-WebSocket-Protocol", ()))
    return [protocol.strip() for protocol in offered.split(",") if protocol.strip()]


def _decoded(text: str) -> bytes:
    try:
        return b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return b"\0"  # it was shown, and is nobody's


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
