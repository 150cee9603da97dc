"""How a generation is answered: as one JSON document, or as server-sent events."""

import logging
from typing import Any, Protocol

import msgspec
from aiohttp import web

from aiollm.api.choice import Choice, Delta
from aiollm.api.errors import ApiError, internal
from aiollm.api.generation import GENERATION, Generation, Usage
from aiollm.api.parts import PARTS
from aiollm.api.pulse import Pulse
from aiollm.api.schema import GenerationRequest, StreamOptions

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx passes events on as they come
}
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """The form of one endpoint's answers."""

    done: bytes
    """Ends a stream."""

    def opening(self) -> bytes:
        """Events that come before any token."""

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """The event for a piece of a choice."""

    def closing(self, choice: Choice, delta: Delta | None, usage: Usage | None) -> bytes:
        """The events for the last piece, if there is one, and the end of a choice."""

    def usage(self, usage: Usage) -> bytes:
        """The event that ends the stream's JSON."""

    def whole(self) -> dict[str, Any]:
        """The document for a generation that is complete."""


class Template:
    """The constant bytes of a stream's events, encoded once; only choices are encoded again and again."""

    def __init__(self, generation: Generation, kind: str) -> None:
        self.fields = {
            "id": generation.id, "object": kind, "created": generation.created, "model": generation.model,
        }  # fmt: skip
        self._head = b"data: " + msgspec.json.encode(self.fields)[:-1] + b',"choices":['

    def event(self, choice: bytes, usage: Usage | None = None, more: bytes = b"") -> bytes:
        """One event; `more` are encoded fields with a comma before each."""
        if usage is not None:
            more += b',"usage":' + msgspec.json.encode(usage)
        return b"".join((self._head, choice, b"]", more, b"}\n\n"))


async def answer(
    http: web.Request, request: GenerationRequest, generation: Generation, shape: Shape
) -> web.StreamResponse:
    """Run a generation and answer with it; it ends with the handler, so a client that goes away aborts it."""
    generation.submit()
    http[GENERATION] = generation
    try:
        if request.streams:
            return await _stream(http, generation, shape, request.stream_options or StreamOptions())
        await generation.complete()
        return web.Response(body=msgspec.json.encode(shape.whole()), content_type="application/json")
    finally:
        generation.end()


async def _stream(
    http: web.Request, generation: Generation, shape: Shape, options: StreamOptions
) -> web.StreamResponse:
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(http)
    settings = http.app[PARTS].settings
    transport = http.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    pulse = Pulse(settings.keep_alive, settings.write_timeout, generation.changed.set, transport.abort)
    try:
        await _write(response, pulse, shape.opening())  # with nothing to say it still sends the headers
        choices = generation.choices
        while choices:
            await generation.changed.wait()
            generation.changed.clear()
            if (error := generation.failure()) is not None:
                await _write(response, pulse, _error(error) + shape.done)
                break
            usage = generation.usage if options.continuous_usage_stats else None
            data = [_piece(shape, choice, usage) for choice in choices]
            choices = [choice for choice in choices if choice.finish is None]
            if not choices:
                if options.include_usage:
                    data.append(shape.usage(generation.usage))
                data.append(shape.done)
            if any(data) or pulse.beat:
                await _write(response, pulse, b"".join(data) or KEEP_ALIVE)
        pulse.begin()
        await response.write_eof()
    except ConnectionError:
        raise
    except Exception:
        log.exception("the stream of %s failed", generation.id)
        await _write(response, pulse, _error(internal()) + shape.done)
    finally:
        pulse.stop()
    return response


async def _write(response: web.StreamResponse, pulse: Pulse, data: bytes) -> None:
    pulse.begin()
    await response.write(data)
    pulse.done()


def _piece(shape: Shape, choice: Choice, usage: Usage | None) -> bytes:
    """The events for what a choice has given out since the last look."""
    delta = choice.take()
    if choice.finish is not None:
        return shape.closing(choice, delta, usage)
    return shape.delta(choice, delta, usage) if delta is not None else b""


def _error(error: ApiError) -> bytes:
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
