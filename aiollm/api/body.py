"""The body of a request: read within a size and a time, then decoded, in a thread when long.

aiohttp would inflate by itself, but answers what it does not like outside of our shape.
"""

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import http_exceptions, web

from aiollm.api.access import GOOD_ID, request_id
from aiollm.api.decoding import decode
from aiollm.api.errors import ApiError
from aiollm.api.schema import GenerationRequest

# JSON decodes at some 100 MB/s: longer bodies would hold the event loop for more than 2 ms.
THREAD_BYTES = 256 * 1024
THREAD_IDS = 100_000  # numpy takes over a list of ids at 12 ms a million
ENCODINGS = ("identity", "gzip", "deflate")
T = TypeVar("T")
N = TypeVar("N", bound=GenerationRequest)
READ = web.RequestKey("read", bytes)
"""A body that was read already, for the handler that it is for."""


async def read(request: web.Request, limit: int, seconds: float) -> bytes:
    """The whole body, inflated. Raises ApiError: 413 beyond `limit` bytes, 408 after `seconds`, 415, 400."""
    if READ in request:
        return request[READ]
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ENCODINGS:
        message = f"Content-Encoding {encoding[:40]} is not understood; use one of: {', '.join(ENCODINGS)}"
        raise ApiError(415, message, code="unsupported_encoding")
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.content.iter_any():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        message = f"the request body did not arrive within {seconds:g} s"
        raise ApiError(408, message, code="body_timeout") from None
    except (web.RequestPayloadError, http_exceptions.HttpProcessingError) as error:
        raise ApiError(400, f"the request body is broken: {error}", code="invalid_body") from error
    if encoding == "identity":
        return bytes(body)
    inflated = await asyncio.to_thread(_inflate, body, limit)
    if len(inflated) > limit:
        raise _too_large(limit)
    return inflated


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body exceeds the limit of {limit} bytes", code="body_too_large")


def _inflate(body: bytearray, limit: int) -> bytes:
    """Up to `limit` + 1 bytes of what was compressed. Raises ApiError where it is no whole gzip or zlib stream."""
    inflate = zlib.decompressobj(wbits=47)  # 32 + 15: both formats, told apart by their heads
    try:
        data = inflate.decompress(body, limit + 1)
    except zlib.error as error:
        raise ApiError(400, f"the request body is not compressed as it says: {error}", code="invalid_body") from error
    if not inflate.eof and len(data) <= limit:
        raise ApiError(400, "the compressed request body is cut short", code="invalid_body")
    return data


class _Named(msgspec.Struct):
    """Where a body holds the request's id."""

    request_id: Any = None
    rid: Any = None


_NAMED = msgspec.json.Decoder(_Named)


async def decoded(request: web.Request, body: bytes, decode: Callable[[bytes], T]) -> T:
    """`decode(body)`; what is no JSON and does not claim to be is answered with 415."""
    try:
        return await in_thread_if(len(body) > THREAD_BYTES, decode, body)
    except ApiError as error:
        if error.code == "invalid_json" and not _claims_json(request):
            message = f"the body is {request.content_type}, not JSON: send it with Content-Type: application/json"
            raise ApiError(415, message, code="unsupported_media_type") from error
        raise


async def identified(request: web.Request, body: bytes, decode: Callable[[bytes], N]) -> N:
    """`decoded`, of a body that may hold the request's id; it is taken from one that is refused too."""
    try:
        found = await decoded(request, body, decode)
    except ApiError:
        request_id(request, await in_thread_if(len(body) > THREAD_BYTES, _own_id, body))
        raise
    request_id(request, found.own_id)
    return found


def _own_id(body: bytes) -> str | None:
    """A decent id in a body whose other fields are not looked at."""
    try:
        named = decode(_NAMED, body)
    except ApiError:
        return None
    return next((id for id in (named.request_id, named.rid) if isinstance(id, str) and GOOD_ID.fullmatch(id)), None)


async def in_thread_if(long: bool, function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, beside the event loop if it is going to take long."""
    return await asyncio.to_thread(function, *args) if long else function(*args)


async def json_response(value: object, size: int = 0) -> web.Response:
    """A JSON answer; one of about `size` numbers or characters is encoded in a thread where that is much."""
    data = await in_thread_if(size > THREAD_IDS, msgspec.json.encode, value)
    return web.Response(body=data, content_type="application/json")


def _claims_json(request: web.Request) -> bool:
    kind = request.content_type
    return "Content-Type" not in request.headers or kind == "application/json" or kind.endswith("+json")
