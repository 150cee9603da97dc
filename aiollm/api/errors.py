"""Refusals and failures in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import http
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from aiollm.engine.engine import EngineBusy

RETRY_AFTER = {"loading": "5"}  # seconds; draining and stopped servers come back later, or never
UNREAD_BODY = (408, 413)  # answers to a body that was not read to its end: the connection cannot go on


class ApiError(Exception):
    """What the client is told. `param` names the field at fault, `code` is a slug that programs may compare."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """A fresh response; the connection is closed where the request's body was left unread."""
        response = web.Response(
            status=self.status,
            body=msgspec.json.encode(self.body()) + b"\n",
            content_type="application/json",
            headers=self.headers,
        )
        if self.status in UNREAD_BODY:
            response.force_close()
        return response


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the request that cannot be accepted."""
    return ApiError(400, message, code=code, param=param)


def engine_error(message: str, available: bool, code: str = "engine_error") -> ApiError:
    """A request that the engine gave up: 500, not to be repeated, or 503 where the server itself goes away."""
    if available:
        return ApiError(500, message, code=code, headers={"x-should-retry": "false"})
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": "30"})


def too_late(message: str, retry_after: int) -> ApiError:
    """A request that waited until its time was over."""
    return ApiError(503, message, code="queue_timeout", headers={"Retry-After": str(retry_after)})


def described(error: ApiError | EngineBusy | web.HTTPException, path: str) -> ApiError:
    """What a handler or the router raised on purpose, in our shape."""
    path = path[:200]
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusy):
        retry = RETRY_AFTER.get(error.reason, "30") if error.retry_after is None else str(error.retry_after)
        status = 429 if error.reason == "rate_limit_exceeded" else 503
        return ApiError(status, str(error), code=error.reason, headers={"Retry-After": retry})
    if isinstance(error, web.HTTPMethodNotAllowed):
        message = f"{path} does not take {error.method}, only {allowed(error)}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed(error)})
    if isinstance(error, web.HTTPNotFound):
        return ApiError(404, f"there is nothing at {path}", code="not_found")
    status = http.HTTPStatus(error.status)
    return ApiError(error.status, error.text or status.phrase, code=status.name.lower())


def allowed(error: web.HTTPMethodNotAllowed) -> str:
    """The methods that a path takes."""
    return ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))


def internal() -> ApiError:
    """For an exception that nobody foresaw: it would come again, so clients should not repeat the request."""
    return ApiError(500, "internal error", code="internal_error", headers={"x-should-retry": "false"})
