"""API keys: who may ask for anything but the probes and the files of the chat page.

A key is shown as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Browsers cannot set headers of a WebSocket, so there
it may also be one of the subprotocols offered: `aiollm.key.` and the key in base64url without padding, beside `aiollm`,
which is the one that the server takes up. Queries are not looked at: addresses end up in histories and logs.
"""

import hmac
from base64 import b64decode
from collections.abc import Iterable, Mapping
from hashlib import sha256

from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm.api.key_file import Entry
from aiollm.api.quota import Key, unauthorized

SUBPROTOCOL = "aiollm"
KEY_SUBPROTOCOL = "aiollm.key."


class Keys:
    """The keys of a server, as digests. Without any, and without a file of them, everybody is let in."""

    def __init__(self, keys: Iterable[str] = (), file: Mapping[str, Entry] | None = None) -> None:
        """As `replace`."""
        self.open = True
        self._keys: list[Key] = []
        self.replace(keys, file)

    def __len__(self) -> int:
        return len(self._keys)

    def replace(self, keys: Iterable[str], file: Mapping[str, Entry] | None) -> None:
        """From now on the keys are these: some as they are, which are called by numbers, and those of the file if there
        is one. Who stays keeps what it has used. Raises ValueError where that would open a server that asks for keys.
        """
        plain = {sha256(key.encode()).hexdigest(): key for key in keys}
        if not self.open and not plain and file is None:
            raise ValueError("a server that asks for API keys goes on to; start it again to let everybody in")
        named = {digest: (str(at), Entry(sha256=digest, shares_cache=True)) for at, digest in enumerate(plain, 1)}
        named |= {entry.sha256: (name, entry) for name, entry in (file or {}).items()}
        before = {key.digest.hex(): key for key in self._keys}
        for digest in before.keys() - named.keys():
            before[digest].revoke()
        self._keys = [before.get(digest) or Key(*rule) for digest, rule in named.items()]
        for key, rule in zip(self._keys, named.values(), strict=True):
            key.rule(*rule)
        self.open = not plain and file is None

    @property
    def cache_shares(self) -> dict[str, float]:
        """What keys, by name, may keep of the prefix cache where that differs from the others."""
        return {key.name: key.cache_share for key in self._keys if key.cache_share is not None}

    def find(self, key: bytes) -> Key | None:
        """The one that is shown. The time it takes says nothing about them: digests, all of them, to their ends."""
        digest = sha256(key).digest()
        at = sum([at * hmac.compare_digest(own.digest, digest) for at, own in enumerate(self._keys, 1)])
        return self._keys[at - 1] if at else None


KEYS = web.AppKey("keys", Keys)
KEY = web.RequestKey("key", Key)
"""The key that a request has shown."""
OPEN: web.AppKey[frozenset[Handler]] = web.AppKey("open", frozenset)
"""Handlers that answer without a key."""


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request through that shows a key, or needs none. Raises ApiError (401)."""
    keys = request.app[KEYS]
    if not keys.open and request.match_info.handler not in request.app[OPEN]:
        shown = shown_keys(request)
        if not shown:
            raise unauthorized("this server asks for an API key: send it as `Authorization: Bearer KEY`")
        key = keys.find(shown.pop()) if len(shown) == 1 else None
        if key is None:
            raise unauthorized("the API key is not one of this server's")
        request[KEY] = key
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
