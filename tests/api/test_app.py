"""Paths, methods, ids and defaults: what surrounds every handler."""

import asyncio
import json
import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from stand import MODEL, ROWS, Runner, stand

from aiollm.api import status
from aiollm.api.app import GET, POST, PROBES, make_app, make_door, serve
from aiollm.api.turns import Starts
from aiollm.engine.engine import Engine
from aiollm.engine.engine import Settings as EngineSettings
from aiollm.engine.policy import Conservative
from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.messages import Loading

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}


def ask(served: Runner, method: str, path: str, **options: Any) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of an answer."""

    async def main() -> tuple[int, dict[str, str], bytes]:
        async with served.stand.session.request(method, served.stand.url + path, **options) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return response.status, headers, await response.read()

    return served.run(main())


@pytest.mark.parametrize("path", ["/v1", "/v1/nothing", "//v1/models", "/v1/chat", "/..%2f..%2fetc/passwd", "/%00"])
def test_an_unknown_path_is_404_in_our_shape(served: Runner, path: str) -> None:
    answer = served.run(served.stand.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b'"type":"invalid_request_error","param":null,"code":"not_found"}}' in answer


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "OPTIONS, POST"), ("DELETE", CHAT, "OPTIONS, POST"), ("HEAD", CHAT, "OPTIONS, POST"),
     ("POST", "/v1/models", "GET, HEAD, OPTIONS"), ("PUT", "/health", "GET, HEAD, OPTIONS")],
)  # fmt: skip
def test_a_wrong_method_is_405_and_told_the_right_ones(served: Runner, method: str, path: str, allow: str) -> None:
    status, headers, body = ask(served, method, path)
    assert (status, headers["allow"]) == (405, allow)
    assert method == "HEAD" or b'"code":"method_not_allowed"' in body


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/models", "/health", "/metrics"])
def test_options_are_answered(served: Runner, path: str) -> None:
    status, headers, body = ask(served, "OPTIONS", path)
    assert (status, body) == (204, b"") and "OPTIONS" in headers["allow"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path", ["/health", "/livez", "/ping", "/ready", "/readyz", "/version", "/metrics", "/v1/models"]
)
def test_head_is_answered_and_a_trailing_slash_changes_nothing(served: Runner, path: str) -> None:
    status, _, body = ask(served, "HEAD", path)
    assert (status, body) == (200, b"")
    assert ask(served, "GET", path + "/")[0] == 200


def test_every_route_answers_options_and_every_get_answers_head(served: Runner) -> None:
    for path in GET | POST:
        status, headers, body = ask(served, "OPTIONS", re.sub(r"{.*}", "tiny", path))
        assert (status, body) == (204, b""), path
        assert ("HEAD" in headers["allow"]) == (path in GET or path == "/")
    assert ask(served, "HEAD", "/v1/models/tiny")[::2] == (200, b"")


def test_a_trailing_slash_changes_nothing_for_a_chat(served: Runner) -> None:
    assert served.run(served.stand.post(CHAT + "/", BODY))[0] == 200


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-1.2:3_x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/nothing"), ("POST", CHAT)])
def test_every_answer_has_a_request_id(served: Runner, sent: str, kept: bool, method: str, path: str) -> None:
    _, headers, _ = ask(served, method, path, headers={"X-Request-Id": sent})
    assert (headers["x-request-id"] == sent) is kept
    assert 1 <= len(headers["x-request-id"]) <= 128


def test_the_same_request_id_may_be_used_twice_at_once(served: Runner) -> None:
    async def main() -> None:
        answers = await asyncio.gather(*(served.stand.post(CHAT, BODY, **{"X-Request-Id": "same"}) for _ in range(2)))
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1]["id"] != answers[1][1]["id"]

    served.run(main())


def test_pipelined_requests_are_answered_in_order(served: Runner) -> None:
    async def main() -> bytes:
        one = b"GET /v1/models/%s HTTP/1.1\r\nHost: x\r\n%s\r\n"
        names = [b"org/tiny" if i % 2 else b"none%d" % i for i in range(50)]
        return await served.stand.raw(
            b"".join(one % (name, b"Connection: close\r\n" if i == 49 else b"") for i, name in enumerate(names))
        )

    answers = served.run(main()).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"404", b"200"] * 25
    assert b"none48" in answers[48]


def test_probes_do_not_wait_for_those_who_want_to_begin(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = asyncio.Event()
    monkeypatch.setattr(Starts, "turn", lambda self: theirs.wait())

    async def main() -> None:
        stand = served.stand
        crowd = [asyncio.create_task(stand.post(CHAT, BODY)) for _ in range(20)]
        for path in ("/health", "/ready", "/livez/", "/metrics"):
            async with stand.session.get(stand.url + path) as answer:
                assert answer.status == 200
        assert not any(one.done() for one in crowd)
        theirs.set()
        assert [status for status, _ in await asyncio.gather(*crowd)] == [200] * 20

    served.run(main())


def test_a_request_takes_a_turn_where_it_comes_and_another_behind_its_template(
    served: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 0

    async def turn(self: Starts) -> None:
        nonlocal turns
        turns += 1

    async def main() -> None:
        stand, seen = served.stand, [0]
        await stand.session.get(stand.url + "/health")
        seen.append(turns)
        await stand.post("/v1/completions", {"prompt": "hi"})
        seen.append(turns)
        await stand.post(CHAT, BODY)
        seen.append(turns)
        async with stand.session.ws_connect(stand.url + "/v1/chat/ws") as link:
            seen.append(turns)
            await link.send_json({"type": "chat", "id": "a", **BODY})
            while (await link.receive_json())["type"] != "done":
                pass
        seen.append(turns)
        assert seen == [0, 0, 1, 3, 4, 6]

    monkeypatch.setattr(Starts, "turn", turn)
    served.run(main())


def test_a_connection_goes_on_after_a_refusal(served: Runner) -> None:
    async def main() -> bytes:
        bad = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{"
        return await served.stand.raw(bad + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    answer = served.run(main())
    assert answer.startswith(b"HTTP/1.1 400 ") and b"HTTP/1.1 200 OK" in answer


def test_a_client_that_waits_for_100_continue_gets_it(served: Runner) -> None:
    data = b'{"prompt":"x","max_tokens":1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    answer = served.run(served.stand.raw(head + b"Content-Length: %d\r\n\r\n%s" % (len(data), data)))
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "head",
    ["Content-Length: 5\r\nTransfer-Encoding: chunked", "Content-Length: 5\r\nContent-Length: 6", "Content-Length: -1",
     "Content-Length: abc", "X-Long: " + "x" * 100_000, "Bad Name: x"],
    ids=lambda head: head[:30],
)  # fmt: skip
def test_broken_http_is_refused_and_the_connection_closed(served: Runner, head: str) -> None:
    answer = served.run(served.stand.raw(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\nhello".encode()))
    assert answer.startswith(b"HTTP/1.0 431 " if head.startswith("X-Long") else b"HTTP/1.0 400 ")
    assert re.search(rb"\r\nX-Request-Id: [0-9a-f]{32}\r\n", answer)


def test_what_is_no_http_is_refused_with_a_request_id(served: Runner) -> None:
    answer = served.run(served.stand.raw(b"GARBAGE\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.0 400 ") and b'"code":"invalid_http"' in answer
    assert re.search(rb"\r\nX-Request-Id: [0-9a-f]{32}\r\n", answer)


def test_http_1_0_gets_a_stream_that_ends_with_the_connection(served: Runner) -> None:
    data = b'{"prompt":"x","stream":true}'
    answer = served.run(
        served.stand.raw(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    )
    assert answer.endswith(b"data: [DONE]\n\n") and b"chunked" not in answer.lower()


def test_streams_are_never_compressed(served: Runner) -> None:
    _, headers, body = ask(served, "POST", CHAT, json={**BODY, "stream": True}, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in headers and body.endswith(b"data: [DONE]\n\n")


def test_an_unforeseen_error_is_a_500_that_is_logged(
    served: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiollm.api.chat.output_limit", lambda *args: 1 / 0)
    status, headers, body = ask(served, "POST", CHAT, json=BODY)
    assert (status, headers["x-should-retry"]) == (500, "false")
    assert b'"code":"internal_error"' in body and b"ZeroDivision" not in body
    assert "ZeroDivisionError" in caplog.text


def test_one_line_is_logged_for_each_request_and_none_for_probes(
    served: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")
    ask(served, "POST", CHAT, json={**BODY, "max_tokens": 3}, headers={"X-Request-Id": "me"})
    ask(served, "GET", "/nothing%0a\x7f?key=x")
    for path in [path for path, handler in GET.items() if handler in PROBES]:
        ask(served, "GET", path)
        ask(served, "GET", path + "/")
    first, second = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiollm.access"]
    assert (first["method"], first["path"], first["status"]) == ("POST", CHAT, 200)
    assert (first["id"], first["key"], first["client_gone"], first["finish"]) == ("me", None, False, "length")
    assert (first["prompt_tokens"], first["output_tokens"]) == (21, 3) and first["cached_tokens"] in (0, 20)
    assert 0 <= first["queue_ms"] < first["ttft_ms"] <= first["ms"]
    assert 0 <= first["median_gap_ms"] <= first["longest_gap_ms"] <= first["ms"]
    assert first["generation"].startswith("chatcmpl-") and "prompt" not in first
    assert abs(datetime.fromisoformat(first["time"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert (second["method"], second["path"], second["status"]) == ("GET", "/nothing%0A%7F", 404)
    assert "finish" not in second


@pytest.mark.parametrize("config", [{"temperature": 3}, {"top_p": "x"}, {"top_k": -5}])
def test_sampling_defaults_out_of_range_are_refused_at_the_start(folder: Path, config: dict[str, Any]) -> None:
    engine = Engine(EngineSettings(ROWS, 128, 64, True, Conservative(), 8))
    with pytest.raises(ValueError, match=f"generation_config.json: .*{next(iter(config))}"):
        make_app(engine, Tokenizer.load(str(folder)), ChatTemplate.load(str(folder)), MODEL, config)


def test_a_bound_socket_may_be_served(folder: Path) -> None:
    import socket

    from aiollm.api.app import serve

    async def main() -> None:
        async with stand(folder) as served:
            engine = served.engine
            app = make_app(engine, Tokenizer.load(str(folder)), ChatTemplate.load(str(folder)), MODEL, {})
            sock = socket.create_server(("127.0.0.1", 0))
            runner = await serve(app, "ignored", 0, sock)
            async with served.session.get(f"http://127.0.0.1:{sock.getsockname()[1]}/health") as response:
                assert response.status == 200
            await runner.cleanup()

    asyncio.run(main())


def probes() -> list[tuple[str, str, Any]]:
    """(method, path, handler) of all that a door answers."""
    return [
        (method, spelling, handler)
        for method, table in (("GET", GET), ("HEAD", GET), ("POST", POST))
        for path, handler in table.items()
        if handler in PROBES
        for spelling in (path, path + "/")
    ]


def test_who_comes_while_the_door_gives_way_is_answered(folder: Path) -> None:
    """With a connection that has asked before, one that has asked nothing yet, and one that was just made."""

    async def ask(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
        reader, writer = connection
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: here\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
        return head.split()[1]

    async def main() -> None:
        async with stand(folder) as served:
            app = make_app(served.engine, Tokenizer.load(str(folder)), ChatTemplate.load(str(folder)), MODEL, {})
            entrance = await serve(make_door(served.engine), "127.0.0.1", 0)
            port = entrance.addresses[0][1]
            try:
                used, fresh = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
                assert await ask(used) == b"503"
                turning = asyncio.create_task(entrance.lead_to(app))
                crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
                await turning
                assert [await ask(connection) for connection in (used, fresh, *crowd)] == [b"200"] * 52
                for _, writer in (used, fresh, *crowd):
                    writer.close()
            finally:
                await entrance.cleanup()

    asyncio.run(main())


def test_the_door_answers_probes_and_refuses_the_rest_until_the_model_is_found() -> None:
    async def check() -> None:
        engine = Engine(EngineSettings(1, 16, 16, True, Conservative(), 1))
        engine.on_loading(Loading("downloading the demo model", 0.25))
        runner = await serve(make_door(engine), "127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                for method, path, handler in probes():
                    async with session.request(method, url + path) as answer:
                        assert answer.status == (503 if handler is status.ready else 200), (method, path)
                async with session.get(url + "/health?deep=1") as answer:
                    assert answer.status == 503
                async with session.get(url + "/ready") as answer:
                    found = await answer.json()
                    assert answer.status == 503
                    assert (found["phase"], found["progress"]) == ("downloading the demo model", 0.25)
                for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("PUT", "/nowhere")):
                    async with session.request(method, url + path) as answer:
                        error = (await answer.json())["error"]
                        assert answer.status == 503 and error["code"] == "loading"
                        assert "downloading the demo model" in error["message"]
                        assert answer.headers["Retry-After"]
        finally:
            await runner.cleanup()

    asyncio.run(check())
