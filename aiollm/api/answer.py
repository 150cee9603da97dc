"""How a generation is answered: as one JSON document, or as server-sent events."""

import logging

import msgspec
from aiohttp import web
from aiohttp.http_writer import StreamWriter

from aiollm.api.body import in_thread_if
from aiollm.api.connection import Connection
from aiollm.api.errors import internal
from aiollm.api.generation import GENERATION, Generation
from aiollm.api.parts import PARTS
from aiollm.api.schema import GenerationRequest, StreamOptions
from aiollm.api.shape import Shape
from aiollm.api.stream import OUTBOX, Stream, error_event

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx passes events on as they come
}


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
        document = await in_thread_if(generation.long, lambda: msgspec.json.encode(shape.whole()))
        return web.Response(body=document, content_type="application/json")
    finally:
        generation.end()


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
