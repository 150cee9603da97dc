"""Who may open a socket: a page of this server or no page at all, and under a name that is this machine's."""

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiollm.api.errors import ApiError

DEFAULT_PORTS = {"http": 80, "https": 443}


def check_origin(origin: str | None, host: str | None, address: str, allowed: Sequence[str] = ()) -> None:
    """Raises ApiError (403) for a page of another site.

    `origin` and `host` are the request's headers; browsers always send both, and say truly which page asks. A request
    without Origin comes from a program. `address` is the server's end of the connection: over loopback Host must be a
    loopback name, since a foreign name that resolves to 127.0.0.1 would make a foreign page look like ours (DNS
    rebinding). The port does not matter there: a forwarded one is another.

    `allowed` are the origins of --allowed_origins, under which a reverse proxy shows this server: their pages are ours,
    and so are their names in Host.
    """
    friends = [_authority(other) for other in allowed]
    named = _authority("http://" + (host or ""))
    if _is_loopback(address) and not _is_loopback(named[0]) and named[0] not in {name for name, _ in friends}:
        name = (host or "")[:100]
        message = (
            f"Host {name!r} is no name of this machine: open the server as localhost, 127.0.0.1 or [::1], or name the "
            "origin of a reverse proxy in --allowed_origins"
        )
        raise ApiError(403, message, code="host_not_allowed")
    if origin is None:
        return
    scheme = origin.partition(":")[0].lower()
    theirs, ours = _authority(origin), _authority(f"{scheme}://{host or ''}")
    if scheme not in DEFAULT_PORTS or not theirs[0] or theirs not in (ours, *friends):
        message = (
            f"Origin {origin[:100]!r} is not this server: only its own pages, and those of --allowed_origins, may open "
            "a chat socket"
        )
        raise ApiError(403, message, code="origin_not_allowed")


def _authority(url: str) -> tuple[str, int | None]:
    """Name and port of an origin; ("", None) where it cannot be read."""
    try:
        parts = urlsplit(url)
        if parts.path or parts.query or parts.fragment or parts.username is not None:
            return "", None
        return (parts.hostname or "").rstrip("."), parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return "", None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
