"""GET /v1/chat/ws: several conversations at once over one WebSocket.

Frames are JSON in text frames (ws_frames.py). The client sends `chat`, `cancel` and `ping`; the server `hello`, then
`start`, `delta`... and `done` or `error` for each conversation, and `pong`. A frame that cannot be accepted is answered
with an `error` frame, and the socket lives on. It is closed with

    1001  the server shuts down; an `error` frame comes first
    1003  a binary frame
    1007  a text frame that is not UTF-8 or not JSON
    1008  MAX_REFUSED refused frames in a row
    1009  a frame longer than `max_frame_bytes` of `hello`
    1011  a fault of this server
    1013  the client did not read for `write_timeout` seconds

Nothing is queued for a client that reads slowly: each conversation waits until its last frame was taken, and what is
generated meanwhile goes into its next one. So a socket holds at most the transport's buffer (64 KiB, as much again
until aiohttp looks) and one frame, and no socket delays another. The end of a socket aborts its conversations.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

import msgspec
from aiohttp import WSMsgType, web

from aiollm.api import body
from aiollm.api.access import CLIENT_GONE, UPGRADED, request_id, tell
from aiollm.api.caller import Caller, caller
from aiollm.api.errors import ApiError, described, internal, invalid
from aiollm.api.keys import SUBPROTOCOL, subprotocols
from aiollm.api.origin import check_origin
from aiollm.api.parts import PARTS, Parts
from aiollm.api.ws_conversation import Conversation
from aiollm.api.ws_frames import Cancel, Chat, Done, Error, FromServer, Hello, Ping, Pong, decode, failed, named
from aiollm.engine.engine import EngineBusy

encode = msgspec.json.encode
log = logging.getLogger(__name__)

MAX_CONVERSATIONS = 16
MAX_REFUSED = 32
MAX_SILENT_BEATS = 3  # pings in a row that a client may leave unanswered
CLOSING_SECONDS = 2  # for the client's half of the closing handshake


class Shut(Exception):
    """The socket is to be closed with a code, after an error frame if there is one."""

    def __init__(self, code: int, reason: str, error: ApiError | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.error = error


async def chat_socket(http: web.Request) -> web.StreamResponse:
    """Serve one socket until it ends; 403 for other sites, and 503 while the model loads, come before the upgrade.

    A browser does not tell its page why a socket was refused: a POST to the same address gets the same refusal, or 426.
    """
    parts = http.app[PARTS]
    transport = http.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    own = transport.get_extra_info("sockname")
    address = own[0] if isinstance(own, tuple) else ""  # a Unix socket has none
    try:
        check_origin(http.headers.get("Origin"), http.headers.get("Host"), address, parts.settings.allowed_origins)
    except ApiError as error:
        log.warning("%s refused: %s", request_id(http), error.message)
        raise
    limit = parts.body_limit
    ws = web.WebSocketResponse(
        timeout=CLOSING_SECONDS, max_msg_size=limit, compress=False, autoping=False, protocols=[SUBPROTOCOL]
    )
    offered = subprotocols(http)
    if offered and SUBPROTOCOL not in offered:  # aiohttp would go on, and log what was offered: a key, it may be
        raise ApiError(400, f"Sec-WebSocket-Protocol must offer {SUBPROTOCOL}, or nothing", code="invalid_subprotocol")
    if http.method != "GET" or not ws.can_prepare(http):
        upgrade = {"Upgrade": "websocket"}
        raise ApiError(426, "this path speaks WebSocket only", code="upgrade_required", headers=upgrade)
    who = caller(http)
    await ws.prepare(http)
    http[UPGRADED] = True
    socket = Socket(parts, ws, http, who)
    sockets = http.app[SOCKETS]
    sockets.add(socket)
    try:
        hello = Hello(parts.model.names[0], parts.context, MAX_CONVERSATIONS, limit)
        if (shut := await socket.serve(hello)) is not None:
            try:
                await _close(ws, shut)
            finally:
                transport.abort()  # after a whole handshake nothing is left to send; otherwise nobody reads it
    except asyncio.CancelledError as error:
        raise error.with_traceback(None)  # noqa: B904  a frame of TaskGroup in it holds it, and with it the socket
    finally:
        sockets.discard(socket)
    return ws


async def shut_sockets(app: web.Application) -> None:
    """Signal: the application shuts down."""
    for socket in app[SOCKETS]:
        socket.shut(Shut(1001, "shutting down", ApiError(503, "the server is shutting down", code="draining")))


class Socket:
    """One client's socket: a reader, a heart, and one task for each conversation."""

    def __init__(self, parts: Parts, ws: web.WebSocketResponse, http: web.Request, caller: Caller) -> None:
        self._parts, self._caller = parts, caller
        self._ws = ws
        self._http, self._name = http, request_id(http)
        self._lock = asyncio.Lock()
        self._tasks = asyncio.TaskGroup()
        self._conversations: dict[str, tuple[Conversation, asyncio.Task[None]]] = {}
        self._asked: asyncio.Future[Shut] = asyncio.get_running_loop().create_future()
        self._refused = 0
        self._silent_beats = 0

    async def serve(self, hello: Hello) -> Shut | None:
        """Serve until the client has closed or is gone, or, with a Shut, until the server is to close."""
        found: list[Shut] = []
        try:
            async with self._tasks:
                heart = self._tasks.create_task(self._beat())
                await self._send(hello)
                await self._read()
                heart.cancel()
                for _, task in self._conversations.values():
                    task.cancel()
        except* Shut as shuts:
            found += _flat(shuts)
        except* ConnectionError:
            log.debug("the client of %s is gone", self._name)
        except* Exception:
            log.exception("the socket of %s failed", self._name)
            found.append(Shut(1011, "internal error", internal()))
        return found[0] if found else None

    def shut(self, shut: Shut) -> None:
        """End the socket from outside."""
        if not self._asked.done():
            self._asked.set_result(shut)

    async def _read(self) -> None:
        async for message in self._ws:
            self._silent_beats = 0
            if message.type is WSMsgType.PING:
                async with self._writing():
                    await self._ws.pong(message.data)
            elif message.type is WSMsgType.BINARY:
                raise Shut(1003, "only text frames are understood")
            elif message.type is WSMsgType.TEXT:
                await self._take(message.data.encode())
            elif message.type is WSMsgType.ERROR:  # aiohttp has closed: 1002, 1007 or 1009
                return

    async def _take(self, data: bytes) -> None:
        """One frame of the client."""
        try:
            frame = await body.in_thread_if(len(data) > body.THREAD_BYTES, decode, data)
            if isinstance(frame, Ping):
                await self._send(Pong())
            elif isinstance(frame, Cancel):
                await self._cancel(frame)
            else:
                self._start(frame, data)
            self._refused = 0
        except ApiError as error:
            if error.code == "invalid_json":
                raise Shut(1007, "a frame is not JSON", error) from error
            self._refused += 1
            if self._refused >= MAX_REFUSED:
                raise Shut(1008, f"{MAX_REFUSED} refused frames in a row", error) from error
            # The id of a conversation that runs is kept out of the frame: an error would end it.
            id = named(data)
            await self._send(failed(None if id in self._conversations else id, error))

    def _start(self, frame: Chat, data: bytes) -> None:
        if frame.id in self._conversations:
            raise invalid("id", f"id: {frame.id!r} names a conversation that still runs", "id_in_use")
        if len(self._conversations) >= MAX_CONVERSATIONS:
            message = f"{MAX_CONVERSATIONS} conversations run on this socket already"
            raise ApiError(429, message, code="too_many_conversations")
        conversation = Conversation(self._http, frame.id, time.monotonic(), self._caller)
        task = self._tasks.create_task(self._converse(conversation, data))
        self._conversations[frame.id] = conversation, task
        task.add_done_callback(lambda _: self._conversations.pop(frame.id))

    async def _cancel(self, frame: Cancel) -> None:
        conversation, task = self._conversations.get(frame.id, (None, None))
        if task is None or conversation is None or conversation.ended:
            return
        conversation.ended = True
        task.cancel()
        await asyncio.wait([task])
        await self._send(conversation.done("cancelled"))

    async def _converse(self, conversation: Conversation, data: bytes) -> None:
        status = CLIENT_GONE
        try:
            async with contextlib.aclosing(conversation.frames(data)) as frames:
                async for frame in frames:
                    conversation.ended = isinstance(frame, Done | Error)
                    await self._send(frame)
            status = 200
        except asyncio.CancelledError:
            status = 200 if conversation.ended else CLIENT_GONE  # it was told to end, or the socket has ended
            raise
        except (ApiError, EngineBusy) as error:
            failure = described(error, "")
            status = failure.status
            await self._fail(conversation, failure)
        except (ConnectionError, Shut):
            raise
        except Exception:
            log.exception("a conversation of %s failed", self._name)
            status = internal().status
            await self._fail(conversation, internal())
        finally:
            tell(self._http, "WS", status, conversation.received, conversation.generation)

    async def _fail(self, conversation: Conversation, error: ApiError) -> None:
        conversation.ended = True
        await self._send(failed(conversation.id, error))

    async def _beat(self) -> None:
        """Ping so often that no proxy gives the connection up, and give up a client that never answers."""
        while True:
            await asyncio.wait([self._asked], timeout=self._parts.settings.keep_alive)
            if self._asked.done():
                raise self._asked.result()
            if self._silent_beats >= MAX_SILENT_BEATS:
                raise Shut(1001, "no answer to pings")
            self._silent_beats += 1
            async with self._writing():
                await self._ws.ping()

    async def _send(self, frame: FromServer) -> None:
        data = encode(frame)
        async with self._writing():
            await self._ws.send_frame(data, WSMsgType.TEXT)

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """One writer at a time. Raises Shut where the client does not read."""
        async with self._lock:
            try:
                async with asyncio.timeout(self._parts.settings.write_timeout):
                    yield
            except TimeoutError:
                raise Shut(1013, "the client does not read") from None


SOCKETS: web.AppKey[set[Socket]] = web.AppKey("sockets", set)


def _flat(shuts: BaseExceptionGroup[Shut]) -> list[Shut]:
    """Several tasks may shut a socket at once; the first says why."""
    return [shut for error in shuts.exceptions for shut in ([error] if isinstance(error, Shut) else _flat(error))]


async def _close(ws: web.WebSocketResponse, shut: Shut) -> None:
    """Say why and shake hands, as far as the client plays along."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(CLOSING_SECONDS):
            if shut.error is not None:
                await ws.send_frame(encode(failed(None, shut.error)), WSMsgType.TEXT)
            await ws.close(code=shut.code, message=shut.reason.encode())
