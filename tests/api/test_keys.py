"""API keys, over real sockets: who shows none, a wrong one or too much of one is told so, and nothing else happens."""

import asyncio
import hmac
import io
import json
import logging
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from stand import Runner, Stand, stand

from aiollm.api.app import GET, POST, make_door, serve
from aiollm.api.keys import Keys
from aiollm.api.static import page_routes

KEY, OTHER = "correct-horse+battery/staple==", "another.key"
BEARER = {"Authorization": f"Bearer {KEY}"}
PROBES = {"/health", "/healthz", "/livez", "/liveness", "/ping", "/ready", "/readyz", "/readiness", "/startupz"}
SOCKET = "/v1/chat/ws"
OFFERED = f"aiollm.key.{urlsafe_b64encode(KEY.encode()).decode().rstrip('=')}"


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Runner]:
    """A stand that knows two keys."""
    runner = Runner(folder, keys=(KEY, OTHER))
    yield runner
    runner.close()


class Answer:
    def __init__(self, status: int, headers: Any, text: str) -> None:
        self.status, self.headers, self.text = status, headers, text

    @property
    def refused(self) -> bool:
        """Whether it is the refusal for want of a key, whole."""
        if self.status != 401:
            return False
        error = json.loads(self.text)["error"]
        assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "invalid_request_error", None)
        assert self.headers["WWW-Authenticate"] == "Bearer" and self.headers["X-Request-Id"]
        assert KEY not in self.text and OTHER not in self.text
        return True


async def answer(served: Stand, method: str, path: str, headers: Any = None, data: Any = None) -> Answer:
    async with served.session.request(method, served.url + path, headers=headers, data=data) as response:
        return Answer(response.status, response.headers, await response.text())


def ask(locked: Runner, headers: Any = None, method: str = "GET", path: str = "/v1/models") -> Answer:
    return locked.run(answer(locked.stand, method, path, headers))


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"Authorization": f"bearer   {KEY} "},
        {"Authorization": f"Bearer {OTHER}"},
        {"X-Api-Key": KEY},
        {"X-Api-Key": KEY} | BEARER,
    ],
)
def test_each_key_opens_in_every_header_that_may_bring_it(locked: Runner, headers: dict[str, str]) -> None:
    assert ask(locked, headers).status == 200


def test_who_guesses_keys_where_monitors_ask_is_in_the_log(locked: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")
    for path, headers in (("/metrics", BEARER), ("/metrics", {"X-Api-Key": "guess"}), ("/health", {})):
        ask(locked, headers, path=path)
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiollm.access"]
    assert (line["path"], line["status"], line["key"]) == ("/metrics", 401, None)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer{KEY}"},
        {"Authorization": "bearer x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": f"Bearer {KEY},{OTHER}"},
        {"Authorization": f"Bearer {sha256(KEY.encode()).hexdigest()}"},
        {"Authorization": "Bearer " + "x" * 8000},
        {"Authorization": "Bearer \udcff\udcfe"},
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")],
        BEARER | {"X-Api-Key": OTHER},
        {"Api-Key": KEY},
        {"Cookie": f"api_key={KEY}"},
    ],
    ids=str,
)
def test_no_key_a_wrong_one_and_two_at_once_are_refused(locked: Runner, headers: Any) -> None:
    assert ask(locked, headers).refused


def test_a_key_in_the_address_is_none(locked: Runner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="aiollm"):
        for name in ("api_key", "key", "token", "access_token", "Authorization"):
            assert ask(locked, path=f"/v1/models?{name}={OTHER}").refused
    assert OTHER not in caplog.text


def test_a_key_of_two_megabytes_is_not_even_read(locked: Runner) -> None:
    """F14 wants 401; a header line ends at 8190 bytes, before anybody looks for a key in it."""

    async def main() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", locked.stand.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"x" * (2 << 20))
        try:
            return await reader.read()
        except ConnectionError:
            return b""  # a reset may overtake the answer
        finally:
            writer.transport.abort()

    answer = locked.run(main())
    assert not answer or (answer.startswith(b"HTTP/1.0 431 ") and b'"code":"headers_too_large"' in answer)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_every_route_wants_a_key_but_the_probes_and_the_page(locked: Runner, method: str) -> None:
    routes = GET if method in ("GET", "HEAD") else POST if method == "POST" else {**GET, **POST}
    paths = [re.sub(r"{.*}", "tiny", path) for path in routes]

    async def main() -> None:
        for path in [spelling for route in paths for spelling in {route, route.rstrip("/") + "/"}]:
            found = await answer(locked.stand, method, path)
            if path.rstrip("/") in PROBES and method not in ("OPTIONS", "DELETE"):
                assert found.status == 200, path
            elif path == "/" and method in ("GET", "HEAD"):
                assert found.status == 200
            else:
                assert found.status == 401 if method == "HEAD" else found.refused, path
        assert locked.stand.workers.launched == 0

    locked.run(main())


def test_no_route_of_the_application_was_forgotten(locked: Runner) -> None:
    """Whatever way it was added."""
    routes = list(locked.stand.app.router.routes())
    assert len(routes) > 2 * len({**GET, **POST})
    pages = set(page_routes())

    async def main() -> None:
        open_ones = set()
        for route in routes:
            assert route.resource is not None
            path = route.resource.canonical.replace("{id}", "tiny")
            method = "GET" if route.method == "*" else route.method
            async with locked.stand.session.request(method, locked.stand.url + path) as found:
                if found.status != 401:
                    open_ones.add(path)
        assert {path for path in open_ones if path.rstrip("/") not in PROBES} == pages

    locked.run(main())


def test_the_page_loads_without_a_key(locked: Runner) -> None:
    for path in page_routes():
        assert ask(locked, path=path).status == 200
    assert ask(locked, method="POST", path="/").refused  # the native API lives there too


@pytest.mark.parametrize(
    "path", ["/nowhere", "//v1/models", "/static/../v1/models", "/health/..%2fv1/models", "/metrics"]
)
def test_neither_unknown_paths_nor_figures_are_open(locked: Runner, path: str) -> None:
    assert ask(locked, path=path).refused


def test_a_completion_needs_a_key_and_its_body_is_not_read(locked: Runner) -> None:
    async def main() -> None:
        body = b'{"prompt":"hello","max_tokens":5}'
        kind = {"Content-Type": "application/json"}
        assert (await answer(locked.stand, "POST", "/v1/completions", kind, body)).refused
        assert (await answer(locked.stand, "POST", "/v1/completions", kind, io.BytesIO(bytes(20 << 20)))).refused
        assert locked.stand.workers.launched == 0
        found = await answer(locked.stand, "POST", "/v1/completions", kind | BEARER, body)
        assert json.loads(found.text)["choices"][0]["text"] == "hello"

    locked.run(main())


def test_without_keys_everybody_is_let_in(served: Runner) -> None:
    assert ask(served).status == 200
    assert ask(served, {"Authorization": "Bearer none"}).status == 200


def test_the_door_wants_a_key_while_the_model_is_being_found(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            door = await serve(make_door(served.engine, Keys([KEY])), "127.0.0.1", 0)
            url = f"http://127.0.0.1:{door.addresses[0][1]}"
            lives = {"/health", "/healthz", "/livez", "/liveness", "/ping"}
            for path, headers, status in (
                *((path + slash, None, 200 if path in lives else 503) for path in PROBES for slash in ("", "/")),
                ("/", None, 200), ("/v1/models", None, 401), ("/metrics", None, 401), ("/v1/models", BEARER, 503),
            ):  # fmt: skip
                async with served.session.get(url + path, headers=headers) as response:
                    assert response.status == status, path
            await door.cleanup()

    asyncio.run(main())


def test_every_key_is_compared_whole_whichever_is_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def spy(own: bytes, shown: bytes) -> bool:
        compared.append(own)
        return compare(own, shown)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    names = ["first", "second", "third"]
    keys = Keys(names)
    digests = [sha256(name.encode()).digest() for name in names]
    for shown, found in (("first", "1"), ("third", "3"), ("none", None), ("", None), ("x" * 2_000_000, None)):
        compared.clear()
        key = keys.find(shown.encode())
        assert (key.name if key is not None else None) == found
        assert compared == digests


def test_keys_are_kept_as_digests_only() -> None:
    assert KEY not in repr(vars(Keys([KEY])))


@pytest.mark.parametrize(
    ("headers", "protocols", "chosen"),
    [
        (BEARER, [], None),
        (BEARER, ["aiollm"], "aiollm"),
        ({"X-Api-Key": KEY}, [], None),
        ({}, ["aiollm", OFFERED], "aiollm"),
        ({}, [OFFERED, "aiollm"], "aiollm"),
    ],
)
def test_a_socket_takes_a_key_as_header_or_subprotocol(
    locked: Runner, headers: dict[str, str], protocols: list[str], chosen: str | None
) -> None:
    async def main() -> None:
        url = locked.stand.url + SOCKET
        async with locked.stand.session.ws_connect(url, headers=headers, protocols=protocols) as link:
            assert (await link.receive_json())["type"] == "hello"
            assert link.protocol == chosen

    locked.run(main())


@pytest.mark.parametrize(
    ("protocols", "query", "status"),
    [
        ([], "", 401),
        (["aiollm"], "", 401),
        (["aiollm"], f"?api_key={OTHER}", 401),
        (["aiollm", "aiollm.key."], "", 401),
        (["aiollm", "aiollm.key.bm9uZQ"], "", 401),
        (["aiollm", "aiollm.key.!"], "", 401),
        (["aiollm", f"aiollm.key.{OTHER}"], "", 401),
        (["aiollm", OFFERED, "aiollm.key.bm9uZQ"], "", 401),
        ([OFFERED], "", 400),
    ],
)
def test_a_socket_without_the_key_is_refused_before_it_opens(
    locked: Runner, protocols: list[str], query: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await locked.stand.session.ws_connect(locked.stand.url + SOCKET + query, protocols=protocols)
        assert refused.value.status == status

    with caplog.at_level(logging.DEBUG):
        locked.run(main())
    told = "".join(record.getMessage() for record in caplog.records if record.name.startswith(("aiollm", "aiohttp.")))
    assert OFFERED not in told and KEY not in told and OTHER not in told


def test_a_page_can_ask_why_its_socket_was_refused(locked: Runner) -> None:
    assert ask(locked, method="POST", path=SOCKET).refused
    assert ask(locked, BEARER, "POST", SOCKET).status == 426
    foreign = ask(locked, BEARER | {"Origin": "https://chat.example"}, "POST", SOCKET)
    assert foreign.status == 403 and "--allowed_origins" in foreign.text
