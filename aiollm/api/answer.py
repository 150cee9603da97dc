"""How a generation is answered, as one JSON document or as server-sent events, and how others may end it."""

import contextlib
import logging
from collections.abc import Iterator

import msgspec
from aiohttp import web
from aiohttp.http_writer import StreamWriter

from aiollm.api.access import request_id
from aiollm.api.body import in_thread_if
from aiollm.api.caller import caller
from aiollm.api.connection import Connection
from aiollm.api.errors import ApiError, internal
from aiollm.api.generation import GENERATION, Generation
from aiollm.api.parts import PARTS
from aiollm.api.schema import GenerationRequest, StreamOptions
from aiollm.api.shape import Shape
from aiollm.api.stream import OUTBOX, Stream, error_event

log = logging.getLogger(__name__)

RUNNING: web.AppKey[dict[Generation, str]] = web.AppKey("running", dict)
"""Generations that are being answered, each with the id of its HTTP request, or of its socket's."""

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx passes events on as they come
}


async def answer(
    http: web.Request, request: GenerationRequest, generation: Generation, shape: Shape
) -> web.StreamResponse:
    """Run a generation and answer with it; it ends with the handler, so a client that goes away aborts it."""
    with running(http, generation):
        http[GENERATION] = generation
        if request.streams:
            return await _stream(http, generation, shape, request.stream_options or StreamOptions())
        await generation.complete()
        document = await in_thread_if(generation.long, lambda: msgspec.json.encode(shape.whole()))
        return web.Response(body=document, content_type="application/json")


@contextlib.contextmanager
def running(http: web.Request, generation: Generation) -> Iterator[None]:
    """Submit a generation, which others may end while it lasts; inside it may be completed, at the end it is ended."""
    generation.submit()
    http.app[RUNNING][generation] = request_id(http)
    try:
        yield
    finally:
        del http.app[RUNNING][generation]
        generation.end()


async def cancel(http: web.Request) -> web.Response:
    """End a request by the id in its answer, or by its X-Request-Id; it is answered with the error `cancelled`."""
    asked, owner = http.match_info["id"], caller(http).name
    found = [
        generation
        for generation, request in http.app[RUNNING].items()
        if asked in (generation.id, generation.id.partition("-")[2], request) and generation.owner == owner
    ]
    if not found:
        raise ApiError(404, f"no request of the id {asked[:200]} is running", code="not_found", param="id")
    for generation in found:
        generation.abort()
    return web.Response(
        body=msgspec.json.encode({"id": asked, "cancelled": len(found)}), content_type="application/json"
    )


async def _stream(
    http: web.Request, generation: Generation, shape: Shape, options: StreamOptions
) -> web.StreamResponse:
    response = web.StreamResponse(headers=HEADERS)
    writer, connection = await response.prepare(http), http.protocol
    assert isinstance(writer, StreamWriter) and isinstance(connection, Connection)
    stream = Stream(generation, shape, options, connection, writer.chunked, http.app[PARTS].settings, http.app[OUTBOX])
    try:
        await response.write(shape.opening())  # with nothing to say it still sends the headers
        stream.start()
        await response.write_eof(await stream.last)
    except ConnectionError:
        raise
    except Exception:
        log.exception("the stream of %s failed", generation.id)
        await response.write_eof(error_event(internal()) + shape.done)
    finally:
        stream.stop()
    return response
