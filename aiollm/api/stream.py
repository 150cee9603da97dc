"""Streams are written from outside of their handlers: after the tokens of an iteration, all of them in one go.

Waking a task for each stream, and that task's way through aiohttp's writer, cost more than all else that a token needs.
Texts are made before the first of them is written: a client that reads many streams is waked once and stays awake,
which makes each of the writes cheaper.
"""

import asyncio
import logging

import msgspec
from aiohttp import web

from aiollm.api.choice import Choice
from aiollm.api.connection import Connection
from aiollm.api.errors import ApiError, internal
from aiollm.api.generation import Generation, Usage
from aiollm.api.parts import Settings
from aiollm.api.pulse import Pulse
from aiollm.api.schema import StreamOptions
from aiollm.api.shape import Shape
from aiollm.api.turns import Turns

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"


def write_all(due: "list[Stream]") -> None:
    """Write what there is of streams that may have something."""
    found = [(stream, stream.take()) for stream in due]
    now = asyncio.get_running_loop().time()
    for stream, data in found:
        if data:
            stream.write(data, now)


class Stream:
    """The events of one generation on their way to its client, from the headers to the last piece.

    Nothing is taken while the client does not read: what is generated meanwhile shares an event.
    """

    __slots__ = (
        "_chunked", "_tells_usage", "_open", "_some_ended", "_due", "_paused", "_pulse", "last", "_generation",
        "_shape", "_options", "_connection", "_transport", "_outbox",
    )  # fmt: skip

    def __init__(
        self,
        generation: Generation,
        shape: Shape,
        options: StreamOptions,
        connection: Connection,
        chunked: bool,
        settings: Settings,
        outbox: "Turns[Stream]",
    ) -> None:
        """`chunked` as HTTP says it. Raises ConnectionResetError where the client is gone."""
        transport = connection.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._generation, self._shape, self._options = generation, shape, options
        self._connection, self._transport, self._outbox = connection, transport, outbox
        self._chunked, self._tells_usage = chunked, options.continuous_usage_stats
        self._open = generation.choices
        self._some_ended = self._due = self._paused = False
        self._pulse = Pulse(settings.keep_alive, settings.write_timeout, self.mark, transport.abort)
        self._pulse.begin()  # the headers and the opening
        self.last: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """The last piece, which the handler writes together with the end of the response."""

    def start(self) -> None:
        """The headers are written: from now on the stream writes by itself."""
        for choice in self._open:
            choice.on_text, choice.on_end = self.mark, self._end
            self._some_ended |= choice.finish is not None
        self._connection.on_pause = self._pause
        self._pause(self._connection.writing_paused)

    def stop(self) -> None:
        """Nothing more is written, and no timer runs."""
        self._pulse.stop()
        self._connection.on_pause = None
        for choice in self._generation.choices:
            choice.on_text = choice.on_end = _nothing
        self.last.cancel()

    def mark(self) -> None:
        """There may be something to take."""
        if not self._due:
            self._due = True
            self._outbox.add(self)

    def take(self) -> bytes:
        """Events for what came since the last look, or a sign of life where one is due; empty at the end."""
        self._due = False
        if self._paused or self.last.done():
            return b""
        try:
            data = self._events()
        except Exception:
            log.exception("the stream of %s failed", self._generation.id)
            self.last.set_result(error_event(internal()) + self._shape.done)
            return b""
        return data or (KEEP_ALIVE if self._pulse.beat and not self.last.done() else b"")

    def write(self, data: bytes, now: float) -> None:
        """Hand events to the transport, as aiohttp's writer would; `now` is the loop's time."""
        if self._transport.is_closing():
            return  # the handler is about to be cancelled
        try:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        except Exception:  # the others of this turn are written all the same
            log.exception("the stream of %s could not be written", self._generation.id)
            self._transport.abort()
        if not self._paused:
            self._pulse.done(now)

    def _events(self) -> bytes:
        if self._some_ended:
            return self._closing()
        usage = self._generation.usage if self._tells_usage else None
        delta = self._shape.delta
        found = [delta(choice, new, usage) for choice in self._open if (new := choice.take()) is not None]
        return found[0] if len(found) == 1 else b"".join(found)

    def _closing(self) -> bytes:
        """As `_events`, where a choice has ended."""
        if (error := self._generation.failure()) is not None:
            self.last.set_result(error_event(error) + self._shape.done)
            return b""
        usage = self._generation.usage if self._tells_usage else None
        data = b"".join([self._piece(choice, usage) for choice in self._open])
        self._open = [choice for choice in self._open if choice.finish is None]
        self._some_ended = False
        if self._open:
            return data
        self._pulse.begin()  # the end of the response
        if self._options.include_usage:
            data += self._shape.usage(self._generation.usage)
        self.last.set_result(data + self._shape.done)
        return b""

    def _piece(self, choice: Choice, usage: Usage | None) -> bytes:
        delta = choice.take()
        if choice.finish is not None:
            return self._shape.closing(choice, delta, usage)
        return self._shape.delta(choice, delta, usage) if delta is not None else b""

    def _end(self) -> None:
        self._some_ended = True
        self.mark()

    def _pause(self, paused: bool) -> None:
        """The client does not read what was written, or reads again."""
        self._paused = paused
        if paused:
            self._pulse.begin()
        else:
            self._pulse.done()
            self.mark()


def _nothing() -> None:
    """Nobody writes any more."""


OUTBOX: web.AppKey[Turns[Stream]] = web.AppKey("outbox", Turns)


def error_event(error: ApiError) -> bytes:
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
