"""Limits of a key: choices at once, tokens per minute, priority, and its part of the prefix cache."""

import asyncio
import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stand import SLOTS, Stand, stand

from aiollm.api.errors import ApiError
from aiollm.api.key_file import Entry
from aiollm.api.keys import KEYS, Keys
from aiollm.api.quota import Key
from aiollm.engine.share import Shares

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 4}


def entry(key: str, **limits: Any) -> Entry:
    return Entry(sha256=sha256(key.encode()).hexdigest(), **limits)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refusal(key: Key, choices: int, now: float) -> ApiError | None:
    try:
        key.check(choices, now, 7)
    except ApiError as error:
        return error
    return None


def test_choices_at_once_are_counted_until_they_end() -> None:
    key = Key("k", entry("k", max_requests=3))
    assert refusal(key, 3, 0.0) is None
    key.begin(2, 10)
    refused = refusal(key, 2, 0.0)
    assert refused is not None and (refused.status, refused.headers["Retry-After"]) == (429, "7")
    assert refusal(key, 1, 0.0) is None
    key.end(2, 5)
    assert refusal(key, 3, 0.0) is None
    never = refusal(key, 4, 0.0)
    assert never is not None and (never.status, never.param) == (400, None)


def test_tokens_come_back_with_time_and_a_debt_is_waited_off() -> None:
    key = Key("k", entry("k", tokens_per_minute=60))
    assert refusal(key, 1, 1000.0) is None
    key.begin(1, 50)
    assert refusal(key, 1, 1000.0) is None  # 10 are left
    key.begin(1, 50)
    key.end(1, 20)
    key.end(1, 0)
    refused = refusal(key, 1, 1000.0)  # at -60
    assert refused is not None and refused.code == "rate_limit_exceeded"
    assert refused.headers["Retry-After"] == "61"
    assert refusal(key, 1, 1060.5) is not None
    assert refusal(key, 1, 1061.0) is None
    key.begin(1, 1_000_000)
    refused = refusal(key, 1, 1061.0)
    assert refused is not None and refused.headers["Retry-After"] == "120"
    # idle for a day: no more than one minute's tokens were saved up
    later = Key("k", entry("k", tokens_per_minute=60))
    assert refusal(later, 1, 1e6) is None
    later.begin(1, 60)
    assert refusal(later, 1, 1e6) is not None


def test_new_limits_keep_what_was_used() -> None:
    keys = Keys((), {"a": entry("a", tokens_per_minute=100), "b": entry("b")})
    first, second = keys.find(b"a"), keys.find(b"b")
    assert first is not None and second is not None
    assert refusal(first, 1, 5.0) is None
    first.begin(1, 300)
    keys.replace((), {"renamed": entry("a", tokens_per_minute=1000, max_requests=1), "c": entry("c")})
    assert keys.find(b"a") is first and first.name == "renamed"
    refused = refusal(first, 1, 5.0)  # the one that runs
    assert refused is not None and "max_requests" in refused.message
    first.end(1, 0)
    refused = refusal(first, 1, 5.0)  # and the debt of 200
    assert refused is not None and "tokens_per_minute" in refused.message
    assert keys.find(b"b") is None and keys.find(b"c") is not None
    revoked = refusal(second, 1, 5.0)
    assert revoked is not None and (revoked.status, revoked.code) == (401, "invalid_api_key")


def test_a_server_that_asks_for_keys_is_never_opened_by_a_reload() -> None:
    keys = Keys(["k"])
    with pytest.raises(ValueError, match="goes on to"):
        keys.replace((), None)
    assert not keys.open and keys.find(b"k") is not None
    keys.replace((), {})  # an empty file opens nothing either
    assert not keys.open and len(keys) == 0
    opened = Keys()
    assert opened.open
    opened.replace((), {"a": entry("a")})
    assert not opened.open


def test_a_key_that_is_given_twice_has_the_files_name() -> None:
    keys = Keys(["x", "y", "x"], {"alice": entry("y", max_requests=1)})
    found = [keys.find(key) for key in (b"x", b"y")]
    assert [key.name if key else None for key in found] == ["1", "alice"] and len(keys) == 2


async def status(served: Stand, key: str, **fields: Any) -> tuple[int, str]:
    code, answer = await served.post(TEXT, {**BODY, **fields}, **bearer(key))
    return code, answer["error"]["code"] if "error" in answer else ""


def test_over_http_each_key_has_its_own_limits(folder: Path) -> None:
    async def main() -> None:
        file = {"few": entry("few", max_requests=2), "poor": entry("poor", tokens_per_minute=12), "free": entry("free")}
        async with stand(folder, keys=["plain"], key_file=file) as served:
            core = served.engine.core
            assert core is not None
            served.workers.held = True
            running = asyncio.create_task(served.post(TEXT, {**BODY, "n": 2}, **bearer("few")))
            await served.until(lambda: len(core.ledger.running) == 2)
            assert await status(served, "few") == (429, "rate_limit_exceeded")
            assert await status(served, "few", n=3) == (400, "invalid_value")
            served.workers.release()
            assert (await running)[0] == 200
            assert await status(served, "few", n=2) == (200, "")
            assert await status(served, "poor", prompt="x" * 9) == (200, "")  # 13 tokens in all
            assert await status(served, "poor") == (429, "rate_limit_exceeded")
            for key in ("plain", "free"):
                assert await status(served, key) == (200, "")
            assert await status(served, "nobody") == (401, "invalid_api_key")
            async with served.session.get(served.url + "/metrics", headers=bearer("plain")) as response:
                figures = await response.text()
            for line in (
                'aiollm_key_tokens_total{key="few",kind="generated"} 16.0',
                'aiollm_key_tokens_total{key="poor",kind="prompt"} 9.0',
                'aiollm_key_tokens_total{key="poor",kind="generated"} 4.0',
                'aiollm_key_tokens_total{key="1",kind="prompt"} 5.0',
            ):
                assert line in figures, line

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"n": 3}, "n"),
        (TEXT, {"n": 2, "best_of": 3}, "best_of"),
        (TEXT, {"prompt": ["a", "b", "c"]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3}, "n"),
        ("/v1/embeddings", {"input": ["a", "b", "c"]}, "input"),
        ("/generate", {"inputs": "x", "parameters": {"n": 3, "do_sample": True}}, "n"),
        ("/generate", {"inputs": "x", "parameters": {"best_of": 3, "do_sample": True}}, "best_of"),
    ],
)
def test_what_a_key_may_never_have_is_named_by_its_field(
    folder: Path, path: str, body: dict[str, Any], param: str
) -> None:
    async def main() -> None:
        async with stand(folder, key_file={"k": entry("k", max_requests=2)}) as served:
            status, answer = await served.post(path, {**BODY, **body}, **bearer("k"))
            assert (status, answer["error"]["param"]) == (400, param)
            assert answer["error"]["message"].startswith(f"{param}: 3 choices or inputs at once")

    asyncio.run(main())


def test_a_refused_or_cancelled_request_gives_its_place_back(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, queue=1, key_file={"k": entry("k", max_requests=16)}) as served:
            core = served.engine.core
            assert core is not None
            served.workers.held = True
            tasks = [asyncio.create_task(served.post(TEXT, {**BODY, "n": 8}, **bearer("k")))]
            await served.until(lambda: len(core.ledger.running) == 8)
            tasks.append(asyncio.create_task(served.post(TEXT, BODY, **bearer("k"))))
            await served.until(lambda: len(core.waiting) == 1)
            for _ in range(20):
                assert (await status(served, "k"))[0] == 503  # the queue is full, and the key is not
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            served.workers.release()
            await served.until(lambda: core.idle)
            assert await status(served, "k", n=16) == (200, "")
            # a socket counts as well, and gives back
            url = served.url + "/v1/chat/ws"
            async with served.session.ws_connect(url, headers=bearer("k")) as link:
                assert (await link.receive_json())["type"] == "hello"
                message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                for _ in range(20):
                    await link.send_json({"type": "chat", "id": "a", **message})
                    while (frame := await link.receive_json())["type"] != "done":
                        assert frame["type"] in ("start", "delta"), frame

    asyncio.run(main())


def test_priorities_stop_at_the_keys_bound(folder: Path) -> None:
    async def main() -> None:
        file = {"batch": entry("batch", min_priority=5), "user": entry("user")}
        async with stand(folder, key_file=file) as served:
            core = served.engine.core
            assert core is not None
            served.workers.held = True
            tasks = [asyncio.create_task(served.post(TEXT, {**BODY, "n": 8}, **bearer("user")))]
            await served.until(lambda: len(core.ledger.running) == 8)
            for at, (key, priority) in enumerate((("batch", -100), ("batch", None), ("batch", 9), ("user", -3))):
                tasks.append(asyncio.create_task(served.post(TEXT, {**BODY, "priority": priority}, **bearer(key))))
                await served.until(lambda at=at: len(core.waiting) == at + 1)
            assert sorted((request.key, request.priority) for request in core.waiting) == [
                ("batch", 5), ("batch", 5), ("batch", 9), ("user", -3),
            ]  # fmt: skip
            served.workers.release()
            assert all(code == 200 for code, _ in await asyncio.gather(*tasks))

    asyncio.run(main())


def test_no_key_sees_what_another_one_has_in_the_cache(folder: Path) -> None:
    async def main() -> None:
        file = {
            "a": entry("a"), "b": entry("b"),
            "c": entry("c", shares_cache=True), "d": entry("d", shares_cache=True),
        }  # fmt: skip
        async with stand(folder, key_file=file) as served:

            async def cached(key: str, **fields: Any) -> int:
                body = {**BODY, "prompt": "one prompt of all", **fields}
                code, answer = await served.post(TEXT, body, **bearer(key))
                assert code == 200
                found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                return found

            assert await cached("a") == 0 and await cached("a") == 16
            assert await cached("b") == 0 and await cached("b") == 16
            assert await cached("b", cache_salt="s") == 0 and await cached("b", cache_salt="s") == 16
            assert await cached("a", cache_salt="s") == 0
            assert await cached("a", extra_key="k") == 0 and await cached("a", cache_salt="k") == 16
            for salt in ("a", "a\0", "a\0s", "\0a\0"):
                assert await cached("c", cache_salt=salt) == 0  # a name is no way in
            assert await cached("c") == 0 and await cached("d") == 16

    asyncio.run(main())


def test_a_key_that_floods_the_cache_leaves_the_others_theirs(folder: Path) -> None:
    async def main() -> None:
        file = {"quiet": entry("quiet"), "flood": entry("flood", cache_share=0.5)}
        async with stand(folder, key_file=file) as served:
            served.engine.share(1.0, Shares(0.9, served.app[KEYS].cache_shares))
            core = served.engine.core
            assert core is not None

            async def cached(key: str, prompt: str, **fields: Any) -> int:
                code, answer = await served.post(TEXT, {**BODY, "prompt": prompt, **fields}, **bearer(key))
                assert code == 200
                found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                return found

            await cached("quiet", "q" * 400)
            for at in range(3 * SLOTS // 400):
                await cached("flood", f"{at:09}" + "f" * 391, cache_salt=str(at))
            assert core.ledger.index.evicted > SLOTS
            assert await cached("quiet", "q" * 400) == 399
            core.lose_worker()  # whoever comes next keeps to the same shares
            assert [core.ledger.index.queues.part(name).share for name in ("quiet", "flood")] == [0.9, 0.5]

    asyncio.run(main())


def test_lines_of_the_access_log_name_the_key(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")

    async def main() -> None:
        async with stand(folder, keys=["plain"], key_file={"alice": entry("secret")}) as served:
            for key in ("secret", "plain", "wrong"):
                await served.post(TEXT, BODY, **bearer(key))

    asyncio.run(main())
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiollm.access"]
    assert [(line["status"], line["key"]) for line in lines] == [(200, "alice"), (200, "1"), (401, None)]
    assert "secret" not in caplog.text and "plain" not in caplog.text.replace("text/plain", "")


def test_a_score_counts_for_its_key_too(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, key_file={"poor": entry("poor", tokens_per_minute=3)}) as served:
            assert served.engine.ready is not None
            served.engine.ready = msgspec.structs.replace(served.engine.ready, scores=True)
            assert (await served.post("/get_score", {"chat": "hello"}, **bearer("poor")))[0] == 200
            assert (await served.post("/get_score", {"chat": "hello"}, **bearer("poor")))[0] == 429

    asyncio.run(main())


def test_a_socket_is_refused_its_next_conversation_once_its_key_is_gone(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, key_file={"a": entry("a")}) as served:
            url = served.url + "/v1/chat/ws"
            chat = {"type": "chat", "id": "1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            async with served.session.ws_connect(url, headers=bearer("a")) as link:
                await link.receive_json()
                await link.send_json(chat)
                while (await link.receive_json())["type"] != "done":
                    pass
                served.app[KEYS].replace((), {"b": entry("b")})
                await link.send_json(chat)
                frame = await link.receive_json()
                assert frame["type"] == "error" and frame["error"]["code"] == "invalid_api_key"

    asyncio.run(main())
