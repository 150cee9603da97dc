"""GET /openapi.json: every route with its request, answers, errors and keys, from the routes and the types of both.

`DOCS` says of a handler what its types do not. A handler that is not there is described by its docstring.
"""

import asyncio
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from aiollm import __version__
from aiollm.api import answers, chat, completions, embeddings, invocations, native, score, status, tokenize, ws
from aiollm.api.answer import cancel
from aiollm.api.caller import LONGEST, TIMEOUT
from aiollm.api.field_texts import TEXTS
from aiollm.api.keys import KEYS, OPEN
from aiollm.api.native_schema import NativeRequest, Parameters, TokensRequest
from aiollm.api.schema import ChatRequest, CompletionRequest
from aiollm.api.static import PAGE


class Doc(NamedTuple):
    """`text` is a line for people; `requests` are the types that the body may have, `answer` that of the answer."""

    text: str
    requests: Sequence[type[msgspec.Struct]] = ()
    answer: Any = None
    streams: bool = False
    """Whether the answer may be, or is, server-sent events."""
    media: str = "application/json"
    others: Mapping[int, str] = {}
    """Statuses besides those that all have, and what they mean."""


SOCKET = {101: "the socket opens", 403: "a page of another origin", 426: "no WebSocket was asked for"}
DOCS: dict[Handler, Doc] = {
    chat.chat_completions: Doc("chat, OpenAI's", [ChatRequest], answers.ChatCompletion, streams=True),
    completions.completions: Doc("completion of texts, OpenAI's", [CompletionRequest], answers.TextCompletion, True),
    embeddings.embeddings: Doc(
        "vectors of texts, OpenAI's: the last hidden state at the last token", [embeddings.EmbeddingRequest],
        answers.Embeddings,
    ),
    ws.chat_socket: Doc("chats over a WebSocket", others=SOCKET),
    native.generate: Doc("completion of a text, LightLLM's", [NativeRequest], answers.Generated),
    native.generate_stream: Doc("the same as a stream of tokens", [NativeRequest], None, streams=True),
    native.either: Doc("LightLLM's, as a stream if `stream` says so", [NativeRequest], answers.Generated, streams=True),
    native.tokens: Doc("how many tokens a text has", [TokensRequest], answers.Counted),
    native.token_load: Doc("shares of the KV cache in use, now and at the worst moment", (), answers.Load),
    native.model_name: Doc("the first name of the model, LightLLM's", (), answers.ModelName),
    score.get_score: Doc("what a reward model says of a conversation", [score.ScoreRequest], answers.Score),
    tokenize.tokenize: Doc(
        "token ids of texts, or of a chat as the model reads it", [tokenize.TokenizeRequest, ChatRequest],
        answers.Tokenized,
    ),
    tokenize.detokenize: Doc("the text of token ids", [tokenize.DetokenizeRequest], answers.Detokenized),
    cancel: Doc("end a request by the id in its answer, or by its `X-Request-Id`", (), answers.Cancelled),
    invocations.invocations: Doc(
        "SageMaker's door: chat, completion, embeddings, native completion or score, told by the fields",
        [ChatRequest, CompletionRequest, embeddings.EmbeddingRequest, NativeRequest, score.ScoreRequest],
        dict[str, Any], streams=True,
    ),
    status.health: Doc("the server lives; with `?deep=1` the model gives a token too", (), answers.Health),
    status.ready: Doc("requests are served; 503 with how far loading is, until then", (), answers.Readiness),
    status.metrics: Doc("figures for Prometheus", media="text/plain"),
    status.version: Doc("the server's version", (), answers.Version),
    status.server_info: Doc("settings, limits, versions and memory", (), answers.ServerInfo),
    status.models: Doc("the names under which the model is served", (), answers.ModelList),
    status.model: Doc("the model under one of its names", (), answers.ModelCard),
}  # fmt: skip
RUN = frozenset({
    chat.chat_completions, completions.completions, embeddings.embeddings, ws.chat_socket, native.generate,
    native.generate_stream, native.either, score.get_score, invocations.invocations,
})  # fmt: skip
"""What they are asked for is run by the engine, and may have to wait."""

ERRORS = {
    400: "a field or the body cannot be accepted",
    401: "no API key of this server's",
    404: "no such model, request or path",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is no JSON, or compressed in a way that is not understood",
    429: "too many requests of this API key wait; Retry-After tells when to come back",
    500: "the request failed, and would fail again",
    503: "the model is loading, the server drains, or too many wait; Retry-After tells when to come back",
}
OF_GET = (401, 404, 503)
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
REFUSED = "refused: this server does not have it"
IGNORED = "taken, and not looked at"

_ROUTES: web.AppKey[Mapping[str, Mapping[str, Handler]]] = web.AppKey("routes", Mapping)
"""Path and handler of every route, by method."""

_MADE: web.AppKey[dict[bool, bytes]] = web.AppKey("made", dict)
"""The document, with keys and without, once somebody has asked for it: it takes some 30 ms."""


def describe(app: web.Application, routes: Mapping[str, Mapping[str, Handler]]) -> None:
    """What `openapi` needs to know of an application."""
    app[_ROUTES], app[_MADE] = routes, {}


async def openapi(http: web.Request) -> web.Response:
    """The document as it is for those who have to show a key, or for everybody."""
    routes, unlocked, made, locked = http.app[_ROUTES], http.app[OPEN], http.app[_MADE], not http.app[KEYS].open
    if locked not in made:
        made[locked] = await asyncio.to_thread(lambda: msgspec.json.encode(document(routes, unlocked, locked)))
    return web.Response(body=made[locked], content_type="application/json")


DOCS[openapi] = Doc("this server's interface for programs", (), dict[str, Any])
DOCS[PAGE["/"]] = Doc("the chat page", media="text/html")


def doc(handler: Handler) -> Doc:
    """What is said of a handler."""
    return DOCS.get(handler) or Doc((inspect.getdoc(handler) or "").partition("\n")[0].rstrip("."))


def document(
    routes: Mapping[str, Mapping[str, Handler]], open_handlers: Collection[Handler], locked: bool
) -> dict[str, Any]:
    """The whole of openapi.json; `locked` is whether the server asks for keys."""
    docs = list(map(doc, _handlers(routes)))
    requests = {kind for said in docs for kind in said.requests}
    types = requests | {said.answer for said in docs if said.answer is not None} | {answers.Refusal}
    schemas, components = described(sorted(types, key=str))
    paths: dict[str, dict[str, Any]] = {}
    for method, handlers in routes.items():
        for path, handler in handlers.items():
            operation = _operation(method, path, handler, schemas)
            if handler in open_handlers:
                operation["security"] = []
            paths.setdefault(plain(path), {})[method.lower()] = operation
    error = {"application/json": {"schema": schemas[answers.Refusal]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "aiollm", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {f"E{code}": {"description": text, "content": error} for code, text in ERRORS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{"bearer": []}, {"header": []}] if locked else [],
    }


def plain(path: str) -> str:
    """A path of the router as people write it: /v1/models/{id:.+} is /v1/models/{id}."""
    return re.sub(r"{(\w+):[^}]*}", r"{\1}", path)


def _handlers(routes: Mapping[str, Mapping[str, Handler]]) -> Iterable[Handler]:
    return dict.fromkeys(handler for handlers in routes.values() for handler in handlers.values())


def _operation(method: str, path: str, handler: Handler, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    said = doc(handler)
    takes = method == "POST" and len(said.requests) > 0  # some clients send a body with GET, and specifications do not
    content: dict[str, Any] = {}
    if said.answer is not None or not said.streams:
        content[said.media] = {"schema": schemas.get(said.answer, {})}
    if said.streams:
        content["text/event-stream"] = {"schema": EVENT}
    responses = {"200": {"description": said.text, "content": content}}
    responses |= {str(code): {"description": text} for code, text in said.others.items()}
    for code in ERRORS if method == "POST" or said.requests else OF_GET:
        responses.setdefault(str(code), {"$ref": f"#/components/responses/E{code}"})
    if handler is status.ready:  # the probe's own answer, not an error
        responses["503"] = {"description": "it is not ready", "content": content}
    parameters = _parameters(path, handler in RUN)
    operation: dict[str, Any] = {"summary": said.text, "responses": responses, "parameters": parameters}
    if takes:
        schema = (
            {"anyOf": [schemas[kind] for kind in said.requests]}
            if len(said.requests) > 1
            else schemas[said.requests[0]]
        )
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _parameters(path: str, runs: bool) -> list[dict[str, Any]]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)", path)
    ]
    if not runs:
        return named
    seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST}
    about = "seconds from arrival within which the request must begin; else it is answered with 503"
    return [*named, {"name": TIMEOUT, "in": "header", "required": False, "schema": seconds, "description": about}]


def described(types: Sequence[Any]) -> tuple[dict[Any, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The JSON schema of each type, and the types by name that these refer to; fields of requests with their texts."""
    references, components = msgspec.json.schema_components(
        list(map(_encodable, types)), ref_template="#/components/schemas/{name}"
    )
    for kind in filter(_is_request, [*types, Parameters]):
        for name, field in components.get(kind.__name__, {}).get("properties", {}).items():
            text = texts(kind.__name__, name)
            if field == {"default": None}:
                text = REFUSED  # of the type Any
            elif field == {} and not text:
                text = IGNORED  # of the type Raw
            if text and "description" not in field:
                field["description"] = text
    for part in _parts(components):
        if isinstance(pattern := part.get("pattern"), str):
            part["pattern"] = pattern.replace(r"\Z", "$")  # as JavaScript, and so JSON schema, writes it
    return dict(zip(types, references, strict=True)), components


def texts(kind: str, field: str) -> str:
    """The line about a field of a type; empty where there is none."""
    return TEXTS.get(f"{kind}.{field}", TEXTS.get(field, ""))


def _is_request(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ != answers.__name__


def _encodable(kind: Any) -> Any:
    """The type, or one like it without the defaults that msgspec cannot write into a schema: raw JSON."""
    if not _is_request(kind):
        return kind
    fields = msgspec.structs.fields(kind)
    if not any(isinstance(field.default, msgspec.Raw) for field in fields):
        return kind
    raw = msgspec.field(default_factory=msgspec.Raw)
    made = [
        (field.name, field.type)
        if field.required
        else (field.name, field.type, raw if field.type is msgspec.Raw else field.default)
        for field in fields
    ]
    return msgspec.defstruct(kind.__name__, made, kw_only=True, namespace={"__doc__": kind.__doc__})


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(item)
