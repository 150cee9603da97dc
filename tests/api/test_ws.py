import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from stand import CONTEXT, Runner, Stand, stand

from aiollm.api import ws
from aiollm.api.turns import Starts
from aiollm.api.ws import MAX_CONVERSATIONS, MAX_REFUSED

PATH = "/v1/chat/ws"
MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT_TOKENS = 21  # of MESSAGES under the tiny tokenizer's template


@contextlib.asynccontextmanager
async def connected(served: Stand, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A link whose hello was read."""
    async with served.session.ws_connect(served.url + PATH, **options) as link:
        assert (await link.receive_json())["type"] == "hello"
        yield link


def chat(id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"type": "chat", "id": id, "messages": MESSAGES, **fields}


async def frames(link: aiohttp.ClientWebSocketResponse, *ids: str) -> dict[str, list[dict[str, Any]]]:
    """The frames of conversations until each has ended."""
    found: dict[str, list[dict[str, Any]]] = {id: [] for id in ids}
    while any(not own or own[-1]["type"] not in ("done", "error") for own in found.values()):
        frame = await link.receive_json()
        found[frame["id"]].append(frame)
    return found


def text(own: list[dict[str, Any]]) -> str:
    return "".join(frame["text"] for frame in own if frame["type"] == "delta")


@contextlib.asynccontextmanager
async def raw(served: Stand) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A socket without a library, just after the upgrade; its hello is not read."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that little fills it
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", served.port))
    reader, writer = await asyncio.open_connection(sock=own, limit=256)
    writer.write(
        f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def closing(link: aiohttp.ClientWebSocketResponse) -> tuple[list[dict[str, Any]], int | None]:
    """What comes until the server closes, and its code."""
    said = [message.json() async for message in link]
    return said, link.close_code


def on_socket(served: Runner, *sent: dict[str, Any] | str | bytes) -> list[dict[str, Any]]:
    """The answers to frames, one each."""

    async def run() -> list[dict[str, Any]]:
        async with connected(served.stand) as link:
            answers = []
            for frame in sent:
                await (link.send_str(frame) if isinstance(frame, str) else link.send_json(frame))
                answers.append(await link.receive_json())
            return answers

    return served.run(run())


def alone(folder: Path, run: Any, **options: Any) -> None:
    """A stand of its own for `run(stand)`."""

    async def main() -> None:
        async with stand(folder, **options) as served, asyncio.timeout(10):
            await run(served)

    asyncio.run(main())


def test_hello_tells_the_model_and_the_limits(served: Runner) -> None:
    async def run() -> Any:
        async with served.stand.session.ws_connect(served.stand.url + PATH) as link:
            return await link.receive_json()

    hello = served.run(run())
    assert hello.pop("max_frame_bytes") == served.stand.parts.body_limit
    assert hello == {
        "type": "hello", "model": "tiny", "max_model_len": CONTEXT, "max_conversations": MAX_CONVERSATIONS,
    }  # fmt: skip


def test_an_answer_is_start_then_deltas_then_done_with_figures(served: Runner) -> None:
    async def run() -> Any:
        served.stand.workers.say("Grüße, 你好")
        async with connected(served.stand) as link:
            await link.send_json(chat(max_tokens=100))
            return (await frames(link, "a"))["a"]

    start, *deltas, done = served.run(run())
    assert (start["type"], start["prompt_tokens"]) == ("start", PROMPT_TOKENS)
    assert text(deltas) == "Grüße, 你好"
    tokens = [delta["tokens"] for delta in deltas]
    assert tokens == sorted(tokens) and tokens[-1] == len("Grüße, 你好".encode())
    assert done["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == tokens[-1] + 1
    assert done["ttft_ms"] > 0 and done["tokens_per_s"] > 0


def test_conversations_wait_for_their_turn_to_begin(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = asyncio.Event()

    async def run() -> Any:
        stand = served.stand
        async with connected(stand) as link:
            monkeypatch.setattr(Starts, "turn", lambda self: theirs.wait())
            await link.send_json(chat())
            await link.send_json({"type": "ping"})
            assert (await link.receive_json())["type"] == "pong"
            assert stand.engine.core is not None and stand.engine.core.idle
            theirs.set()
            return (await frames(link, "a"))["a"]

    assert served.run(run())[-1]["type"] == "done"


def test_the_second_turn_finds_the_first_in_the_prefix_cache(served: Runner) -> None:
    async def run() -> Any:
        served.stand.workers.say("A sentence that is unlike any other in these tests.")
        async with connected(served.stand) as link:
            turns: list[dict[str, str]] = [{"role": "user", "content": "one"}]
            seen = []
            for question in ("two", "three"):
                await link.send_json(chat(messages=turns))
                own = (await frames(link, "a"))["a"]
                seen.append((own[0]["prompt_tokens"], own[0]["cached_tokens"], own[-1]["usage"]))
                turns += [{"role": "assistant", "content": text(own)}, {"role": "user", "content": question}]
            return seen

    (first, _, _), (_, cached, usage) = served.run(run())
    assert cached > first
    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}


def test_conversations_share_a_socket(served: Runner) -> None:
    async def run() -> Any:
        served.stand.workers.reply = lambda prompt, seed: list(f"answer {seed}".encode() * 3)
        async with connected(served.stand) as link:
            for seed in range(MAX_CONVERSATIONS):
                await link.send_json(chat(str(seed), seed=seed))
            return await frames(link, *map(str, range(MAX_CONVERSATIONS)))

    found = served.run(run())
    assert {id: text(own) for id, own in found.items()} == {id: f"answer {id}" * 3 for id in found}


def test_one_conversation_too_many_is_refused_and_the_others_go_on(served: Runner) -> None:
    async def run() -> Any:
        served.stand.workers.held = True
        async with connected(served.stand) as link:
            ids = [str(number) for number in range(MAX_CONVERSATIONS)]
            for id in [*ids, "more"]:
                await link.send_json(chat(id))
            refused = await link.receive_json()
            served.stand.workers.release()
            return refused, await frames(link, *ids)

    refused, found = served.run(run())
    assert (refused["id"], refused["error"]["code"]) == ("more", "too_many_conversations")
    assert all(own[-1]["type"] == "done" for own in found.values())


def test_an_id_in_use_is_refused_without_ending_its_owner(served: Runner) -> None:
    async def run() -> Any:
        served.stand.workers.held = True
        async with connected(served.stand) as link:
            await link.send_json(chat())
            await link.send_json(chat())
            refused = await link.receive_json()
            served.stand.workers.release()
            await frames(link, "a")
            await link.send_json(chat())
            return refused, (await frames(link, "a"))["a"]

    refused, again = served.run(run())
    assert (refused["id"], refused["error"]["code"]) == (None, "id_in_use")
    assert again[-1]["type"] == "done"


def test_cancel_aborts_in_the_engine_and_says_what_was_generated(served: Runner) -> None:
    async def run() -> Any:
        workers, core = served.stand.workers, served.stand.engine.core
        assert core is not None
        workers.say("x" * 400)
        workers.held = True
        async with connected(served.stand) as link:
            await link.send_json(chat())
            await served.stand.until(lambda: bool(core.ledger.running))
            for _ in range(3):
                workers.step()
            start, delta = await link.receive_json(), await link.receive_json()
            await link.send_json({"type": "cancel", "id": "a"})
            done = await link.receive_json()
            idle = core.idle
            await link.send_json({"type": "cancel", "id": "a"})  # too late, and ignored
            await link.send_json({"type": "ping"})
            return start, delta, done, idle, await link.receive_json()

    start, delta, done, idle, pong = served.run(run())
    assert start["type"] == "start" and delta["text"] == "x" * delta["tokens"]
    assert (done["type"], done["finish_reason"]) == ("done", "cancelled")
    assert done["usage"]["completion_tokens"] == 3
    assert idle and pong == {"type": "pong"}


@pytest.mark.parametrize("close", [True, False], ids=["closed", "cut"])
def test_the_end_of_a_socket_aborts_all_of_it(served: Runner, close: bool) -> None:
    async def run() -> None:
        core = served.stand.engine.core
        assert core is not None
        served.stand.workers.say("x" * 400)
        served.stand.workers.held = True
        async with connected(served.stand) as link:
            for id in "abc":
                await link.send_json(chat(id))
            await served.stand.until(lambda: len(core.ledger.running) == 3)
            if close:
                await link.close()
            else:
                transport = link.get_extra_info("socket")
                assert transport is not None
                transport.shutdown(2)
            await served.stand.until(lambda: core.idle)

    served.run(run())


def test_what_streams_over_http_alone_is_asked_of_streams_here(served: Runner) -> None:
    async def run() -> list[dict[str, Any]]:
        async with connected(served.stand) as link:
            await link.send_json(chat(stream_options={"include_usage": True}, max_tokens=2, stream=False))
            return (await frames(link, "a"))["a"]

    done = served.run(run())[-1]
    assert done["type"] == "done" and done["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "context_length_exceeded", "messages"),
        ({"model": "other"}, "model_not_found", "model"),
        ({"tools": [{}]}, "invalid_value", "tools"),
        ({"n": 2}, "unsupported_field", "n"),
        ({"prompt_logprobs": 1}, "invalid_value", "prompt_logprobs"),
        ({"stream_options": {"include_usage": 5}}, "invalid_value", "stream_options"),
        ({"logprobs": True}, "unsupported_field", "logprobs"),
    ],
)
def test_a_request_is_refused_as_over_http(served: Runner, fields: dict[str, Any], code: str, param: str) -> None:
    (frame,) = on_socket(served, chat(**fields))
    assert (frame["type"], frame["id"]) == ("error", "a")
    assert (frame["error"]["code"], frame["error"]["param"]) == (code, param)
    assert frame["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("frame", "id"),
    [
        ({"type": "nothing", "id": "a"}, "a"), ({"id": "a"}, "a"), ({"type": "chat"}, None), ("[]", None), ("1", None),
        ({"type": "chat", "id": "x" * 65}, None), ({"type": "cancel"}, None),
    ],
)  # fmt: skip
def test_what_is_no_frame_is_answered_and_the_socket_lives(served: Runner, frame: Any, id: str | None) -> None:
    refused, pong = on_socket(served, frame, {"type": "ping"})
    assert (refused["type"], refused["id"], refused["error"]["code"]) == ("error", id, "invalid_frame")
    assert pong == {"type": "pong"}


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("{", 1007), ('{"a":' * 100_000, 1007), (b"binary", 1003), (b"\xff\xfe", 1007), ('{"type":"nothing"}', 1008),
    ],
    ids=["no json", "deep", "binary", "no utf-8", "many refused"],
)  # fmt: skip
def test_close_codes(served: Runner, sent: str | bytes, code: int) -> None:
    async def run() -> Any:
        async with connected(served.stand) as link:
            for _ in range(MAX_REFUSED if code == 1008 else 1):
                if sent == b"\xff\xfe":
                    await link.send_frame(sent, WSMsgType.TEXT)
                elif isinstance(sent, bytes):
                    await link.send_bytes(sent)
                else:
                    await link.send_str(sent)
            return await closing(link)

    said, found = served.run(run())
    assert found == code
    assert all(frame["type"] == "error" for frame in said)


def test_a_frame_that_says_to_be_too_long_is_not_waited_for(served: Runner) -> None:
    async def run() -> bytes:
        async with raw(served.stand) as (reader, writer):
            writer.write(bytes([0x81, 0xFF]) + (served.stand.parts.body_limit + 1).to_bytes(8, "big") + bytes(4) + b"x")
            _, length = await reader.readexactly(2)
            await reader.readexactly(length)  # hello
            return await reader.readexactly(4)

    opcode, _, *code = served.run(run())
    assert (opcode, int.from_bytes(code)) == (0x88, 1009)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 101),
        ({"Origin": "http://{host}"}, 101),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://{host}.evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:9"}, 101),
    ],
)
def test_other_sites_are_refused_before_the_upgrade(served: Runner, headers: dict[str, str], status: int) -> None:
    host = f"127.0.0.1:{served.stand.port}"

    async def run() -> int:
        filled = {name: value.format(host=host) for name, value in headers.items()}
        try:
            async with connected(served.stand, headers=filled):
                return 101
        except aiohttp.WSServerHandshakeError as error:
            return error.status

    assert served.run(run()) == status


def test_a_plain_get_is_told_to_upgrade(served: Runner) -> None:
    async def run() -> Any:
        async with served.stand.session.get(served.stand.url + PATH) as answer:
            return answer.status, answer.headers["Upgrade"], await answer.json()

    status, upgrade, body = served.run(run())
    assert (status, upgrade, body["error"]["code"]) == (426, "websocket", "upgrade_required")


def test_no_socket_opens_while_the_model_loads(folder: Path) -> None:
    async def run(served: Stand) -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await served.session.ws_connect(served.url + PATH)
        assert refused.value.status == 503

    alone(folder, run, loading=True)


def test_the_protocols_own_pings_are_answered_and_sent(folder: Path) -> None:
    async def run(served: Stand) -> None:
        async with connected(served, autoping=False) as link:
            await link.ping(b"are you there")
            pong = await link.receive()
            assert (pong.type, bytes(pong.data)) == (WSMsgType.PONG, b"are you there")
            assert (await link.receive()).type is WSMsgType.PING

    alone(folder, run, keep_alive=0.02)


def test_a_client_that_answers_no_ping_is_given_up(folder: Path) -> None:
    async def run(served: Stand) -> None:
        async with connected(served, autoping=False) as link:
            kinds = [(await link.receive()).type for _ in range(ws.MAX_SILENT_BEATS + 1)]
            assert kinds == [WSMsgType.PING] * ws.MAX_SILENT_BEATS + [WSMsgType.CLOSE]

    alone(folder, run, keep_alive=0.02)


def test_a_client_that_does_not_read_is_closed_and_delays_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It only sends pings, whose answers fill every buffer on the way."""
    monkeypatch.setattr(ws, "CLOSING_SECONDS", 0.05)

    async def run(served: Stand) -> None:
        ping = bytes(125)  # the longest, which comes back: so few fill what the system buffers
        flood = bytes([0x89, 0x80 | len(ping), 0, 0, 0, 0]) + ping
        async with raw(served) as (_, writer), connected(served) as link:

            async def pour() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(flood * 512)
                        await writer.drain()

            pouring = asyncio.create_task(pour())
            served.workers.say("still here")
            while not pouring.done():
                await link.send_json(chat())
                assert text((await frames(link, "a"))["a"]) == "still here"

    alone(folder, run, write_timeout=0.2)


def test_shutting_down_ends_sockets_with_a_word_and_1001(folder: Path) -> None:
    async def run() -> Any:
        async with contextlib.AsyncExitStack() as stack:
            served = await stack.enter_async_context(stand(folder))
            async with aiohttp.ClientSession() as session, session.ws_connect(served.url + PATH) as link:
                await link.receive_json()
                told = asyncio.create_task(closing(link))
                await stack.aclose()
                return await told

    said, code = asyncio.run(run())
    assert [frame["error"]["code"] for frame in said] == ["draining"]
    assert code == 1001


def test_a_draining_server_refuses_new_conversations(folder: Path) -> None:
    async def run(served: Stand) -> None:
        async with connected(served) as link:
            await served.engine.drain(0)
            await link.send_json(chat())
            refused = (await frames(link, "a"))["a"][-1]
            assert (refused["type"], refused["error"]["code"]) == ("error", "draining")

    alone(folder, run)


def test_an_unforeseen_error_is_told_and_logged(
    served: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiollm.api.chat.output_limit", lambda *args: 1 / 0)
    refused, pong = on_socket(served, chat(), {"type": "ping"})
    assert (refused["error"]["code"], pong) == ("internal_error", {"type": "pong"})
    assert "ZeroDivisionError" in caplog.text


def test_a_fault_of_the_socket_closes_it_with_1011(
    served: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiollm.api.ws.decode", lambda data: 1 / 0)

    async def run() -> Any:
        async with connected(served.stand) as link:
            await link.send_json({"type": "ping"})
            return await closing(link)

    said, code = served.run(run())
    assert ([frame["error"]["code"] for frame in said], code) == (["internal_error"], 1011)
    assert "ZeroDivisionError" in caplog.text


def test_each_conversation_is_a_line_in_the_log_and_so_is_the_socket(
    served: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")

    async def run() -> None:
        async with connected(served.stand, headers={"X-Request-Id": "me"}) as link:
            await link.send_json(chat(max_tokens=2))
            await frames(link, "a")
            await link.send_json(chat(max_tokens=400))
            assert (await link.receive_json())["type"] == "start"
            await link.send_json({"type": "cancel", "id": "a"})
            await frames(link, "a")
            await link.send_json(chat(max_tokens=-1))
            await frames(link, "a")

    served.run(run())
    records = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiollm.access"]
    done, cancelled, refused, socket = records
    assert all(line["id"] == "me" and line["path"] == PATH for line in records)
    assert (done["method"], done["status"], done["finish"], done["output_tokens"]) == ("WS", 200, "length", 2)
    assert (cancelled["status"], cancelled["finish"], cancelled["client_gone"]) == (200, "abort", False)
    assert refused["status"] == 400 and "finish" not in refused
    assert (socket["method"], socket["status"]) == ("GET", 101)
