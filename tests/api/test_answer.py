"""Streams that are interrupted: clients that leave or stall, workers that fail, silence."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from stand import Runner, Stand, stand

from aiollm.text.chat import ChatTemplate
from aiollm.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 0}
TEXT_BODY: dict[str, Any] = {"prompt": "hi", "max_tokens": 400, "seed": 0}
CASES = [(CHAT, CHAT_BODY), (TEXT, TEXT_BODY)]


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(data), data)


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


def running(served: Stand) -> int:
    assert served.engine.core is not None
    return len(served.engine.core.ledger.running)


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_client_that_leaves_ends_its_request(
    served: Runner, path: str, body: dict[str, Any], streams: bool, tokens: int
) -> None:
    async def main() -> None:
        served.stand.workers.say("x" * 400)
        served.stand.workers.held = True
        _, writer = await asyncio.open_connection("127.0.0.1", served.stand.port)
        writer.write(request(path, {**body, "stream": streams, "n": 2}))
        await served.stand.until(lambda: running(served.stand) == 2)
        for _ in range(tokens):
            served.stand.workers.step()
            await asyncio.sleep(0)
        await leave(writer)
        await served.stand.until(lambda: running(served.stand) == 0)
        served.stand.workers.release()

    served.run(main())
    assert served.stand.workers.launched <= 2 * (tokens + 1)


def test_a_client_that_leaves_the_queue_is_forgotten(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.held = True
        core = served.stand.engine.core
        assert core is not None
        _, writer = await asyncio.open_connection("127.0.0.1", served.stand.port)
        writer.write(request(TEXT, {**TEXT_BODY, "n": 40}))
        await served.stand.until(lambda: len(core.waiting) > 20)
        await leave(writer)
        await served.stand.until(lambda: core.idle)
        served.stand.workers.release()

    served.run(main())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_nothing(served: Runner) -> None:
    async def main() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", served.stand.port)
        writer.write(request(CHAT, CHAT_BODY)[:-10])
        await writer.drain()
        await leave(writer)

    served.run(main())


def test_a_half_closed_connection_counts_as_gone(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.held = True
        reader, writer = await asyncio.open_connection("127.0.0.1", served.stand.port)
        writer.write(request(CHAT, {**CHAT_BODY, "stream": True}))
        await served.stand.until(lambda: running(served.stand) == 1)
        writer.write_eof()
        await served.stand.until(lambda: running(served.stand) == 0)
        await reader.read()
        await leave(writer)

    served.run(main())


def test_two_hundred_clients_may_leave_at_once(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, queue=200) as served:
            served.workers.say("x" * 400)
            writers = []
            for _ in range(200):
                _, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(request(CHAT, {**CHAT_BODY, "stream": True}))
                writers.append(writer)
            core = served.engine.core
            assert core is not None
            await served.until(lambda: running(served) > 0)
            await asyncio.gather(*map(leave, writers))

    asyncio.run(main())


def test_headers_and_roles_go_out_before_the_first_token(served: Runner) -> None:
    async def main() -> None:
        served.stand.workers.held = True
        for path, body, opening in ((CHAT, CHAT_BODY, b'"role":"assistant"'), (TEXT, TEXT_BODY, b"")):
            response = await served.stand.session.post(served.stand.url + path, json={**body, "stream": True})
            async with response:
                assert response.status == 200
                assert response.headers["Cache-Control"] == "no-cache"
                assert response.headers["X-Accel-Buffering"] == "no"
                if opening:
                    assert opening in await response.content.readline()
        served.stand.workers.release()

    served.run(main())


@pytest.mark.parametrize(("path", "body"), CASES)
def test_silence_is_broken_by_comments_before_the_first_token_and_between_tokens(
    folder: Path, path: str, body: dict[str, Any]
) -> None:
    async def main() -> None:
        async with stand(folder, keep_alive=0.02) as served:
            served.workers.say("~" * 50)
            served.workers.held = True
            async with served.session.post(served.url + path, json={**body, "stream": True}) as response:
                for tokens in range(3):
                    comments = seen = 0
                    while comments < 3 or seen < min(tokens, 1):
                        line = await response.content.readline()
                        seen += line.count(b"~")
                        comments += line == b": keep-alive\n"
                    assert seen == min(tokens, 1)
                    served.workers.step()
                served.workers.release()
                rest = await response.read()
            assert rest.count(b"~") == 48 and rest.endswith(b"data: [DONE]\n\n")

    asyncio.run(main())


def test_a_client_that_reads_nothing_is_cut_off(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, write_timeout=0.05) as served:
            served.workers.say("x" * 490)
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
            # Alternatives make the stream long enough to fill the buffers of the system on its way.
            body = {"prompt": ["p"] * 300, "n": 2, "max_tokens": 500, "stream": True, "logprobs": 20}
            writer.write(request(TEXT, body))
            core = served.engine.core
            assert core is not None
            await served.until(lambda: not core.idle)
            await served.until(lambda: core.idle)
            assert b"[DONE]" not in await reader.read()
            await leave(writer)

    asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), CASES)
def test_an_error_after_200_is_an_event_and_then_the_end(served: Runner, path: str, body: dict[str, Any]) -> None:
    async def main() -> bytes:
        served.stand.workers.reply = lambda prompt, seed: [97, -1]
        return await served.stand.events(path, body)

    events = served.run(main()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))
    assert error == {
        "error": {
            "message": "the model produced logits that are not finite",
            "type": "server_error",
            "param": None,
            "code": "numerical_error",
        }
    }
    assert not any('"finish_reason":"' in event for event in events)


@pytest.mark.parametrize(("path", "body"), CASES)
def test_an_error_before_200_is_a_500_not_to_be_repeated(served: Runner, path: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        served.stand.workers.reply = lambda prompt, seed: [97, -1]
        async with served.stand.session.post(served.stand.url + path, json={**body, "n": 3}) as response:
            assert response.status == 500
            assert response.headers["x-should-retry"] == "false"
            assert (await response.json())["error"]["code"] == "numerical_error"

    served.run(main())


def test_a_server_that_stops_tells_those_who_wait(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            served.workers.held = True
            whole = asyncio.create_task(served.post(CHAT, CHAT_BODY))
            streamed = asyncio.create_task(served.events(CHAT, CHAT_BODY))
            await served.until(lambda: running(served) == 2)
            served.engine.on_stopped("the worker is gone")
            status, answer = await whole
            assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
            assert answer["error"]["message"] == "the worker is gone"
            assert b'data: {"error":{"message":"the worker is gone"' in await streamed
            status, answer = await served.post(CHAT, CHAT_BODY)
            assert (status, answer["error"]["code"]) == (503, "stopped")

    asyncio.run(main())


def test_a_full_queue_answers_503_before_a_request_is_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with stand(folder, queue=4) as served:
            served.workers.held = True
            first = asyncio.create_task(served.post(TEXT, {**TEXT_BODY, "n": 8, "max_tokens": 2}))
            await served.until(lambda: running(served) > 0)
            second = asyncio.create_task(served.post(TEXT, {**TEXT_BODY, "n": 12, "max_tokens": 2}))
            core = served.engine.core
            assert core is not None
            await served.until(lambda: len(core.waiting) == 12)
            async with served.session.post(served.url + TEXT, json=TEXT_BODY) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) <= 120
                assert (await response.json())["error"]["code"] == "queue_full"
            with monkeypatch.context() as patch:
                patch.setattr(Tokenizer, "encode_async", None)
                patch.setattr(ChatTemplate, "render", None)
                native = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
                asked = {TEXT: TEXT_BODY, CHAT: CHAT_BODY, "/generate": native, "/v1/embeddings": {"input": "a"}}
                for path, body in asked.items():
                    status, answer = await served.post(path, body)
                    assert (path, status, answer["error"]["code"]) == (path, 503, "queue_full")
            served.workers.release()
            assert (await first)[0] == (await second)[0] == 200

    asyncio.run(main())


def test_a_failing_shape_ends_the_stream_with_an_error(
    served: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiollm.api.chat.ChatShape.delta", lambda *args: 1 / 0)
    events = served.run(served.stand.events(CHAT, CHAT_BODY))
    assert b'"code":"internal_error"' in events and events.endswith(b"data: [DONE]\n\n")
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_several_tokens_share_a_chunk_only_if_they_came_together(served: Runner) -> None:
    async def main() -> bytes:
        served.stand.workers.say("abcd")
        served.stand.workers.held = True
        events = asyncio.create_task(served.stand.events(TEXT, TEXT_BODY))
        await served.stand.until(lambda: running(served.stand) == 1)
        for _ in range(3):  # without a turn of the loop between them
            served.stand.workers.step()
        served.stand.workers.release()
        return await events

    chunks = served.run(main()).split(b"\n\n")
    assert b'"text":"abc"' in chunks[0] and b'"text":"d"' in chunks[1]
