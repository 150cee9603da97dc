"""Requests that somebody else ends, by id."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from stand import WAIT, Stand, stand

FOREVER: dict[str, Any] = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
KEYS = ("first-key", "second-key")


def on_a_stand(folder: Path, work: Callable[[Stand], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(WAIT), stand(folder, **options) as served:
            served.workers.held = True  # nobody ends by himself
            await work(served)
            served.workers.release()

    asyncio.run(main())


async def cancel(served: Stand, id: str, **headers: str) -> tuple[int, Any]:
    return await served.post(f"/v1/requests/{id}/cancel", b"", **headers)


async def started(served: Stand, requests: int = 1) -> None:
    core = served.engine.core
    assert core is not None
    await served.until(lambda: len(core.ledger.running) + len(core.waiting) == requests)


def test_a_request_is_cancelled_by_the_id_that_its_client_sent(folder: Path) -> None:
    async def work(served: Stand) -> None:
        asked = asyncio.ensure_future(served.post("/v1/completions", FOREVER | {"n": 2}, **{"X-Request-Id": "mine"}))
        await started(served, 2)
        assert await cancel(served, "mine") == (200, {"id": "mine", "cancelled": 1})
        status, answer = await asked
        assert status == 400 and answer["error"]["code"] == "cancelled"
        status, answer = await cancel(served, "mine")
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "not_found", "id")

    on_a_stand(folder, work)


def test_a_stream_is_cancelled_by_the_id_in_its_chunks_and_ends_with_an_error(folder: Path) -> None:
    async def work(served: Stand) -> None:
        served.workers.release()
        served.workers.reply = lambda prompt, seed: [97] * 400
        async with served.session.post(served.url + "/v1/completions", json=FOREVER | {"stream": True}) as response:
            first = json.loads((await response.content.readline()).removeprefix(b"data: "))
            served.workers.held = True
            assert (await cancel(served, first["id"]))[1]["cancelled"] == 1
            events = (await response.read()).split(b"\n\n")
        assert events[-2] == b"data: [DONE]"
        assert json.loads(events[-3].removeprefix(b"data: "))["error"]["code"] == "cancelled"

    on_a_stand(folder, work)


def test_all_requests_of_one_id_are_cancelled_and_no_other(folder: Path) -> None:
    async def work(served: Stand) -> None:
        asked = [
            asyncio.ensure_future(served.post("/v1/completions", FOREVER, **{"X-Request-Id": id}))
            for id in ("one", "one", "two")
        ]
        await started(served, 3)
        assert (await cancel(served, "one"))[1]["cancelled"] == 2
        assert [(await other)[0] for other in asked[:2]] == [400, 400]
        assert not asked[2].done()
        served.workers.release()
        assert (await asked[2])[0] == 200

    on_a_stand(folder, work)


def test_a_key_cancels_its_own_requests_only(folder: Path) -> None:
    async def work(served: Stand) -> None:
        mine, other = ({"Authorization": f"Bearer {key}"} for key in KEYS)
        asked = asyncio.ensure_future(served.post("/v1/completions", FOREVER, **mine, **{"X-Request-Id": "mine"}))
        async with asyncio.timeout(WAIT):
            await started(served)
        assert (await cancel(served, "mine", **other))[0] == 404
        assert (await cancel(served, "mine"))[0] == 401
        assert not asked.done()
        assert (await cancel(served, "mine", **mine))[0] == 200
        assert (await asked)[0] == 400

    on_a_stand(folder, work, keys=KEYS)


def test_a_client_that_goes_away_is_no_longer_known(folder: Path) -> None:
    async def work(served: Stand) -> None:
        async with aiohttp.ClientSession() as session:
            headers = {"X-Request-Id": "gone"}
            asked = asyncio.ensure_future(session.post(served.url + "/v1/completions", json=FOREVER, headers=headers))
            await started(served)
            asked.cancel()
            await started(served, 0)
        assert (await cancel(served, "gone"))[0] == 404

    on_a_stand(folder, work)


def test_answers_on_a_socket_are_cancelled_by_their_ids_or_all_by_that_of_the_socket(folder: Path) -> None:
    async def ended(link: aiohttp.ClientWebSocketResponse) -> dict[str, str]:
        """How each of the answers that are left ended, by its id."""
        frame = await link.receive_json()
        return {frame["id"]: frame["error"]["code"]}

    async def work(served: Stand) -> None:
        chat = {"type": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "ignore_eos": True}
        headers = {"X-Request-Id": "socket"}
        async with served.session.ws_connect(served.url + "/v1/chat/ws", headers=headers) as link:
            await link.receive_json()
            await link.send_json(chat | {"id": "a", "request_id": "mine"})
            for id in "bc":
                await link.send_json(chat | {"id": id})
            await started(served, 3)
            assert (await cancel(served, "a"))[0] == 404, "a client's own id says nothing beyond its socket"
            assert await cancel(served, "mine") == (200, {"id": "mine", "cancelled": 1})
            assert await ended(link) == {"a": "cancelled"}
            assert (await cancel(served, "socket"))[1]["cancelled"] == 2
            assert await ended(link) | await ended(link) == {"b": "cancelled", "c": "cancelled"}
            served.workers.release()
            served.workers.reply = lambda prompt, seed: [97] * 400
            await link.send_json(chat | {"id": "d"})
            start = await link.receive_json()
            served.workers.held = True
            assert (await cancel(served, start["request_id"]))[1]["cancelled"] == 1
            while (frame := await link.receive_json())["type"] != "error":
                assert frame["type"] == "delta"
            assert frame["error"]["code"] == "cancelled"

    on_a_stand(folder, work)
