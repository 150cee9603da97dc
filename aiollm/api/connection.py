"""The listening socket, and connections that answer broken HTTP in our shape and without a traceback in the log."""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import http_exceptions, web

from aiollm.api.access import request_id
from aiollm.api.errors import ApiError
from aiollm.api.metrics import Metrics
from aiollm.api.parts import METRICS

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that wait to be accepted
SPARE_FILES = 16  # descriptors below the limit at which it is told of


class Entrance(web.ServerRunner):
    """Where connections come in. Their requests go to one application and later perhaps to another: no connection ends
    with that, nor does a request that came in just then. `cleanup()` ends all of it."""

    def __init__(self) -> None:
        super().__init__(web.Server(self._handle, request_factory=self._request, handler_cancellation=True))
        self._inside: web.AppRunner | None = None

    async def lead_to(self, app: web.Application) -> None:
        """What comes from now on is for `app`; the one before ends what it has begun."""
        before, inside = self._inside, web.AppRunner(app)
        await inside.setup()
        self._inside = inside
        if before is not None:
            await before.cleanup()

    @property
    def app(self) -> web.Application:
        assert self._inside is not None, "it leads somewhere before it opens"
        return self._inside.app

    async def shutdown(self) -> None:
        if self._inside is not None:
            await self._inside.shutdown()

    async def _cleanup_server(self) -> None:
        if self._inside is not None:
            await self._inside.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._server_inside.request_handler(request)

    def _request(self, *parts: Any) -> web.BaseRequest:
        return self._server_inside.request_factory(*parts)

    @property
    def _server_inside(self) -> web.Server:
        assert self._inside is not None and self._inside.server is not None
        return self._inside.server


class Site(web.SockSite):
    """Listens on a socket. aiohttp's own would lower the backlog, and make connections of its own class."""

    def __init__(self, entrance: Entrance, sock: socket.socket, tls: ssl.SSLContext | None, **options: Any) -> None:
        """`options` are those of web.RequestHandler."""
        super().__init__(entrance, sock, ssl_context=tls, backlog=BACKLOG)
        self._entrance, self._options = entrance, options
        self._last_file = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if self._sock.family == socket.AF_UNIX else loop.create_server
        self._server = await create(self._connection, sock=self._sock, ssl=self._ssl_context, backlog=self._backlog)

    def _connection(self) -> "Connection":
        server = self._entrance.server
        assert server is not None, "the entrance was set up"
        return Connection(self, server, loop=asyncio.get_running_loop(), **self._options)

    @property
    def metrics(self) -> Metrics:
        """Those of the application that requests go to."""
        return self._entrance.app[METRICS]

    def opened(self, descriptor: int) -> None:
        """A connection was accepted. Beyond the limit uvloop closes them at once without a word, so it is said here,
        once."""
        if 0 < self._last_file <= descriptor:
            self._last_file = -1
            log.warning("nearly out of file descriptors, more connections will be closed at once: see `ulimit -n`")


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_site", "on_pause")

    def __init__(self, site: Site, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._site = site
        self.on_pause: Callable[[bool], None] | None = None
        """Told whenever `writing_paused` changes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._site.opened(transport.get_extra_info("socket").fileno())

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.on_pause is not None:
            self.on_pause(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_pause is not None:
            self.on_pause(False)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """aiohttp's hook: the answer to what its parser did not take; the connection ends with it."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client had left when its handler wrote: aiohttp ends quietly with this, and logs others
        if not isinstance(exc, http_exceptions.HttpProcessingError) or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        refused = _refusal(exc)
        self._site.metrics.responses.labels(refused.status).inc()
        log.debug("%s sent broken HTTP: %s", request.remote, refused.message)
        response = refused.response()
        response.headers["X-Request-Id"] = request_id(request)
        response.force_close()
        return response


def _refusal(error: http_exceptions.HttpProcessingError) -> ApiError:
    """What the client is told: the first line, since a picture of its bytes follows in some."""
    if isinstance(error, http_exceptions.LineTooLong):
        message = f"a header, or the address, is longer than {error.args[1]} bytes"
        return ApiError(431, message, code="headers_too_large")
    reason = (error.message.strip().splitlines() or [""])[0].rstrip(":")[:200]
    return ApiError(400, f"the request is broken HTTP: {reason}", code="invalid_http")
