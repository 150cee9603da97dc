"""The operator's socket over a real engine: what it does, and that nobody else reaches it."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from stand import SLOTS, Stand, stand

from aiollm.api.admin import make_admin
from aiollm.api.app import serve
from aiollm.listening import private_socket

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hello, whoever you are", "max_tokens": 2}
ROUTES = [
    ("GET", "/state"),
    *(("POST", path) for path in ("/drain", "/resume", "/flush", "/log_level", "/trace", "/profile")),
]


class Traced:
    """Workers that write down what is asked of them."""

    def __init__(self) -> None:
        self.tracing = False
        self.rows: Mapping[int, int] = {}
        self.asked: tuple[int, bool] | None = None
        self.told: asyncio.Future[bytes]

    def trace(self, path: str, rows: Mapping[int, int]) -> None:
        self.tracing, self.rows = True, rows
        Path(path).write_text("[1]")

    def end_trace(self) -> None:
        self.tracing = False

    @property
    def profiling(self) -> bool:
        return self.asked is not None

    def profile(self, steps: int, with_stack: bool) -> asyncio.Future[bytes]:
        self.asked, self.told = (steps, with_stack), asyncio.get_running_loop().create_future()
        return self.told

    def end_profile(self) -> None:
        if self.asked is not None:
            self.answer(b"what there was")

    def answer(self, profile: bytes | Exception) -> None:
        """As the fleet does when a worker has answered, or died."""
        self.asked = None
        if not self.told.done():
            self.told.set_exception(profile) if isinstance(profile, Exception) else self.told.set_result(profile)


class Operator:
    def __init__(self, served: Stand, session: aiohttp.ClientSession, workers: Traced, runner: web.AppRunner) -> None:
        self.served, self.session, self.workers, self.runner = served, session, workers, runner

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        async with self.session.request(method, "http://admin" + path, data=data) as response:
            return response.status, await response.json()

    async def profile(self, body: Any = None) -> tuple[int, bytes]:
        async with self.session.post("http://admin/profile", data=json.dumps(body or {})) as response:
            return response.status, await response.read()

    async def ready(self) -> int:
        async with self.served.session.get(self.served.url + "/ready") as response:
            return response.status


@contextlib.asynccontextmanager
async def operator(folder: Path, place: Path, **options: Any) -> AsyncIterator[Operator]:
    path = str(place / "admin.sock")
    async with stand(folder, **options) as served:
        with private_socket(path) as sock:
            workers = Traced()
            runner = await serve(make_admin(served.engine, served.parts.metrics, workers), "", 0, sock)
            connector = aiohttp.UnixConnector(path)
            try:
                async with aiohttp.ClientSession(connector=connector) as session:
                    yield Operator(served, session, workers, runner)
            finally:
                await runner.cleanup()


def test_draining_refuses_what_is_new_lets_the_rest_run_and_can_be_taken_back(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            served, core = admin.served, admin.served.engine.core
            assert core is not None
            assert (await admin.ask("POST", "/resume"))[0] == 409
            served.workers.held = True
            running = asyncio.create_task(served.post(TEXT, BODY))
            await served.until(lambda: len(core.ledger.running) == 1)
            status, state = await admin.ask("POST", "/drain")
            assert (status, state["state"], state["running"]) == (200, "draining", 1)
            assert await admin.ready() == 503
            code, answer = await served.post(TEXT, BODY)
            assert (code, answer["error"]["code"]) == (503, "draining")
            assert (await admin.ask("POST", "/drain"))[0] == 200
            served.workers.release()
            assert (await running)[0] == 200
            assert (await admin.ask("GET", "/state"))[1]["running"] == 0
            assert (await admin.ask("POST", "/resume"))[1]["state"] == "ready"
            assert await admin.ready() == 200 and (await served.post(TEXT, BODY))[0] == 200

    asyncio.run(main())


def test_a_server_that_ends_is_not_taken_back(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            await admin.ask("POST", "/drain")
            await admin.served.engine.drain(1)
            status, answer = await admin.ask("POST", "/resume")
            assert (status, answer["error"]["code"]) == (409, "conflict")
            admin.served.engine.on_stopped("over")
            assert (await admin.ask("POST", "/drain"))[0] == 409

    asyncio.run(main())


def test_a_server_without_workers_is_loading_when_it_is_taken_back(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            await admin.ask("POST", "/drain")
            admin.served.engine.on_death()
            assert (await admin.ask("POST", "/resume"))[1]["state"] == "loading"
            assert (await admin.ask("POST", "/drain"))[0] == 409
            admin.served.start()
            assert await admin.ready() == 200

    asyncio.run(main())


def test_flushing_empties_the_cache_but_for_what_runs(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            served, core = admin.served, admin.served.engine.core
            assert core is not None
            for at in range(40):  # more than one slice, and matched again: a second chance saves nothing here
                await served.post(TEXT, {**BODY, "prompt": f"{at} {'x' * 20}"})
                await served.post(TEXT, {**BODY, "prompt": f"{at} {'x' * 20}"})
            held = {**BODY, "prompt": "y" * 30}
            await served.post(TEXT, held)
            served.workers.held = True
            running = asyncio.create_task(served.post(TEXT, held))
            await served.until(lambda: len(core.ledger.running) == 1)
            slots = (await admin.ask("GET", "/state"))[1]["slots"]
            assert slots["all"] == SLOTS and slots["cached_in_use"] >= 29 and slots["cached"] > 40 * 20
            status, answer = await admin.ask("POST", "/flush")
            assert (status, answer) == (200, {"tokens": slots["cached"] - slots["cached_in_use"]})
            served.engine.check_integrity()
            after = (await admin.ask("GET", "/state"))[1]["slots"]
            assert after["cached"] == after["cached_in_use"] == slots["cached_in_use"]
            assert after["free"] == slots["free"] + answer["tokens"]
            served.workers.release()
            assert (await running)[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 29
            again = await served.post(TEXT, {**BODY, "prompt": f"1 {'x' * 20}"})
            assert again[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert (await admin.ask("POST", "/flush"))[1]["tokens"] > 0
            assert (await admin.ask("POST", "/flush"))[1]["tokens"] == 0

    asyncio.run(main())


def test_the_log_level_changes(folder: Path, tmp_path: Path) -> None:
    before = logging.getLogger().level

    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            assert await admin.ask("POST", "/log_level", {"level": "debug"}) == (200, {"level": "debug"})
            assert logging.getLogger().level == logging.DEBUG
            assert (await admin.ask("GET", "/state"))[1]["log_level"] == "debug"
            for wrong in ({"level": "loud"}, {}, {"level": "info", "more": 1}, []):
                assert (await admin.ask("POST", "/log_level", wrong))[0] == 400
            assert logging.getLogger().level == logging.DEBUG

    try:
        asyncio.run(main())
    finally:
        logging.getLogger().setLevel(before)


def test_a_trace_is_the_answer_and_there_is_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            served, core = admin.served, admin.served.engine.core
            assert core is not None
            served.workers.held = True
            running = asyncio.create_task(served.post(TEXT, BODY))
            await served.until(lambda: len(core.ledger.running) == 1)
            first = asyncio.create_task(admin.ask("POST", "/trace", {"seconds": 0.2}))
            await served.until(lambda: admin.workers.tracing)
            assert (await admin.ask("GET", "/state"))[1]["tracing"] is True
            assert (await admin.ask("POST", "/trace"))[0] == 409
            assert await first == (200, [1]) and not admin.workers.tracing
            (row,) = core.ledger.running.values()
            assert admin.workers.rows == {row.index: row.generation}
            for seconds in (0, -1, 61, "x"):
                assert (await admin.ask("POST", "/trace", {"seconds": seconds}))[0] == 400
            status, answer = await admin.ask("POST", "/trace", {"second": 1})
            error = answer["error"]
            assert (status, error["param"], error["code"]) == (400, "second", "unknown_field")
            assert error["message"] == "second: this field is unknown"
            served.workers.release()
            await running

    asyncio.run(main())


def test_a_trace_ends_with_its_client_and_with_the_server(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            gone = asyncio.create_task(admin.ask("POST", "/trace", {"seconds": 60}))
            await admin.served.until(lambda: admin.workers.tracing)
            gone.cancel()
            await admin.served.until(lambda: not admin.workers.tracing)
            last = asyncio.create_task(admin.ask("POST", "/trace", {"seconds": 60}))
            await admin.served.until(lambda: admin.workers.tracing)
            await admin.runner.cleanup()
            assert await last == (200, [1])

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def test_a_profile_is_the_answer_and_there_is_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            first = asyncio.create_task(admin.profile({"steps": 3, "with_stack": True}))
            await admin.served.until(lambda: admin.workers.profiling)
            assert admin.workers.asked == (3, True)
            assert (await admin.ask("GET", "/state"))[1]["profiling"] is True
            assert (await admin.ask("POST", "/profile"))[0] == 409
            admin.workers.answer(b"a profile")
            assert await first == (200, b"a profile")
            for field, values in {"steps": (0, -1, 201, "x", 1.5), "with_stack": (1, "x"), "more": (1,)}.items():
                for value in values:
                    status, answer = await admin.ask("POST", "/profile", {field: value})
                    assert status == 400 and field in answer["error"]["message"]
            broken = asyncio.create_task(admin.ask("POST", "/profile"))
            await admin.served.until(lambda: admin.workers.profiling)
            assert admin.workers.asked == (20, False)
            admin.workers.answer(RuntimeError("a worker process was ended by signal 9"))
            status, answer = await broken
            assert status == 500 and "signal 9" in answer["error"]["message"]
            admin.served.engine.on_death()
            assert (await admin.ask("POST", "/profile"))[0] == 503
            admin.served.start()

    asyncio.run(main())


def test_a_profile_ends_in_time_with_its_client_and_with_the_server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            with monkeypatch.context() as patch:
                patch.setattr("aiollm.api.admin.PROFILE_SECONDS", 0.01)
                assert await admin.profile() == (200, b"what there was"), "a server that idles"
            gone = asyncio.create_task(admin.profile())
            await admin.served.until(lambda: admin.workers.profiling)
            gone.cancel()
            await admin.served.until(lambda: not admin.workers.profiling)
            last = asyncio.create_task(admin.profile())
            await admin.served.until(lambda: admin.workers.profiling)
            await admin.runner.cleanup()
            assert await last == (200, b"what there was")

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def test_the_public_listener_has_none_of_these_routes(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, keys=["user"]) as served:
            for headers in ({}, {"Authorization": "Bearer user"}):
                for method, path in ROUTES:
                    for prefix in ("", "/admin", "/v1"):
                        url = served.url + prefix + path
                        async with served.session.request(method, url, headers=headers) as response:
                            assert response.status == (404 if headers else 401), url

    asyncio.run(main())


def test_what_it_does_is_in_the_access_log(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiollm.access")

    async def main() -> None:
        async with operator(folder, tmp_path) as admin:
            await admin.ask("POST", "/flush")
            assert (await admin.ask("GET", "/nothing"))[0] == 404
            assert (await admin.ask("GET", "/flush"))[0] == 405

    asyncio.run(main())
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "aiollm.access"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/flush", 200), ("GET", "/nothing", 404), ("GET", "/flush", 405),
    ]  # fmt: skip
