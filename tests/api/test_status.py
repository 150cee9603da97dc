import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stand import CONTEXT, CREATED, ROWS, SLOTS, Runner, Stand, stand

from aiollm import __version__, config
from aiollm.wire.messages import Loading

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


async def get(served: Stand, path: str) -> tuple[int, Any]:
    async with served.session.get(served.url + path) as response:
        return response.status, json.loads(await response.read())


def entry(name: str, length: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "aiollm",
        "root": "/models/tiny",
        "parent": None,
        "max_model_len": length,
    }


def test_models_are_listed_and_found_by_name(served: Runner) -> None:
    listed = {"object": "list", "data": [entry("tiny", CONTEXT), entry("org/tiny", CONTEXT)]}
    assert served.run(get(served.stand, "/v1/models")) == (200, listed)
    for path in ("/v1/models/org/tiny", "/v1/models/org/tiny/", "/v1/models/org%2Ftiny"):
        assert served.run(get(served.stand, path)) == (200, entry("org/tiny", CONTEXT))
    status, answer = served.run(get(served.stand, "/v1/models/other"))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_version(served: Runner) -> None:
    assert served.run(get(served.stand, "/version")) == (200, {"version": __version__})


def test_server_info_tells_limits_versions_and_memory_and_no_secret(folder: Path) -> None:
    async def main() -> None:
        keys, shown = ["a-secret-key"], {"tp": 1, "schedule_policy": "past-future"}
        headers = {"Authorization": "Bearer a-secret-key"}
        async with stand(folder, loading=True, keys=keys, shown=shown) as served:
            async with served.session.get(served.url + "/server_info") as response:
                assert response.status == 401
            async with served.session.get(served.url + "/server_info", headers=headers) as response:
                info = await response.json()
            assert (response.status, info["status"]) == (200, "loading")
            assert info["limits"]["max_model_len"] is info["memory"] is info["model"]["architecture"] is None
            served.start()
            async with served.session.get(served.url + "/server_info", headers=headers) as response:
                text = await response.text()
            assert "secret" not in text and str(folder) not in text
            info = json.loads(text)
            assert info["status"] == "ready" and info["version"] == __version__
            assert info["versions"]["msgspec"] == msgspec.__version__
            assert info["model"] == {
                "names": ["tiny", "org/tiny"], "root": "/models/tiny", "architecture": "echo", "data_type": "none",
                "vocabulary": 259, "scores": False,
            }  # fmt: skip
            assert info["limits"] | {"body_bytes": 0} == {
                "max_model_len": CONTEXT, "running_requests": ROWS, "waiting_requests": 64, "kv_tokens": SLOTS,
                "n": 128, "choices": 1024, "body_bytes": 0, "body_seconds": 30,
            }  # fmt: skip
            assert info["settings"] == shown and info["memory"] == {}

    asyncio.run(main())


def test_settings_that_are_shown_name_no_path_key_or_address() -> None:
    secrets = {
        "model_dir": "/secret/a", "revision": "secret", "chat_template": "/secret/b", "api_key": ("secret",),
        "host": "secret", "record": "/secret/c", "trace": "/secret/d", "model_name": ("secret",),
        "allowed_origins": ("http://secret",),
    }  # fmt: skip
    told = config.shown(config.Config(**secrets, tp=2))
    assert told["tp"] == 2 and told["data_type"] == "auto" and "max_total_token_num" in told
    assert "secret" not in json.dumps(told)


def test_a_deep_probe_tells_whether_the_model_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            path = "/health?deep=1"
            assert (await get(served, path))[0] == 503
            served.start()
            assert await get(served, path) == (200, {"status": "ok"}) and served.workers.launched == 1
            served.workers.held = True
            several = [asyncio.create_task(get(served, path)) for _ in range(5)]
            core = served.engine.core
            assert core is not None
            await served.until(lambda: len(core.ledger.running) == 1)
            assert (await get(served, "/health"))[0] == 200
            served.workers.release()
            assert [(await task)[0] for task in several] == [200] * 5
            served.workers.reply = lambda prompt, seed: [-1]
            status, answer = await get(served, path)
            assert (status, answer["error"]["code"]) == (500, "numerical_error")
            served.workers.held = True
            monkeypatch.setattr("aiollm.api.deep.SECONDS", 0.01)
            status, answer = await get(served, path)
            assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
            served.workers.reset()

    asyncio.run(main())


def test_readiness_follows_the_engine_and_health_does_not(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            served.engine.on_loading(Loading("weights", 0.25))
            for path in ("/ready", "/readyz"):
                assert await get(served, path) == (
                    503, {"status": "loading", "phase": "weights", "progress": 0.25, "error": ""},
                )  # fmt: skip
            assert (await get(served, "/v1/models"))[1]["data"][0] == entry("tiny", None)
            status, answer = await served.post("/v1/chat/completions", BODY)
            assert (status, answer["error"]["code"]) == (503, "loading")
            assert "weights 25%" in answer["error"]["message"]
            assert (await get(served, "/health"))[0] == 200

            served.start()
            assert await get(served, "/ready") == (
                200, {"status": "ready", "phase": "ready", "progress": 1.0, "error": ""},
            )  # fmt: skip
            assert (await served.post("/v1/chat/completions", BODY))[0] == 200

            await served.engine.drain(1)
            assert (await get(served, "/ready"))[0] == 503
            status, answer = await served.post("/v1/chat/completions", BODY)
            assert (status, answer["error"]["code"]) == (503, "draining")

            served.engine.on_stopped("no device")
            assert (await get(served, "/ready"))[1]["error"] == "no device"
            for path in ("/health", "/livez", "/ping"):
                assert await get(served, path) == (200, {"status": "ok"})

    asyncio.run(main())


def test_refusals_while_loading_tell_when_to_come_back(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served:
            for path in ("/v1/chat/completions", "/v1/completions"):
                async with served.session.post(served.url + path, json=BODY) as response:
                    assert (response.status, response.headers["Retry-After"]) == (503, "5")

    asyncio.run(main())
