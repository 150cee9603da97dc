"""Service levels over real sockets: who waits too long, or asks for too much, is told so and when to come back."""

import asyncio
from pathlib import Path
from typing import Any

from stand import Runner, Stand, stand

from aiollm.engine.scheduler import Service

TEXT = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def held(served: Stand, rows: int = 8, **headers: str) -> asyncio.Task[Any]:
    """All rows are taken, and nothing moves."""
    served.workers.held = True
    task = asyncio.create_task(served.post(TEXT, {**BODY, "n": rows}, **headers))
    core = served.engine.core
    assert core is not None
    await served.until(lambda: len(core.ledger.running) == rows)
    return task


async def waiting(served: Stand, count: int) -> None:
    core = served.engine.core
    assert core is not None
    await served.until(lambda: len(core.waiting) == count)


def test_priority_has_a_range(served: Runner) -> None:
    status, answer = served.run(served.stand.post(TEXT, {**BODY, "priority": 101}))
    assert status == 400 and "priority" in answer["error"]["message"]
    assert served.run(served.stand.post(TEXT, {**BODY, "priority": -100}))[0] == 200


def test_a_time_that_is_none_is_refused(served: Runner) -> None:
    for text in ("soon", "0", "-1", "nan", "1e9"):
        status, answer = served.run(served.stand.post(TEXT, BODY, **{"X-Request-Timeout": text}))
        assert status == 400 and answer["error"]["param"] == "X-Request-Timeout"


def test_priorities_decide_who_begins_first(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            tasks = [await held(served)]
            core = served.engine.core
            assert core is not None
            for at, priority in enumerate((1, 0, -1)):
                tasks.append(asyncio.create_task(served.post(TEXT, {**BODY, "priority": priority})))
                await waiting(served, at + 1)
            assert [request.priority for request in core.waiting] == [-1, 0, 1]
            served.workers.release()
            assert all(status == 200 for status, _ in await asyncio.gather(*tasks))

    asyncio.run(main())


def test_a_request_that_waits_too_long_is_answered_503(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, engine={"service": Service(queue_timeout=0.2)}) as served:
            first = await held(served)
            async with served.session.post(served.url + TEXT, json=BODY) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (503, "queue_timeout") and "did not begin" in error[
                    "message"
                ]
                assert 1 <= int(response.headers["Retry-After"]) <= 120
            assert b'"code":"queue_timeout"' in await served.events(TEXT, BODY)
            served.workers.release()
            assert (await first)[0] == 200

    asyncio.run(main())


def test_a_client_says_itself_for_how_long_it_waits(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            first = await held(served)
            status, answer = await served.post(TEXT, BODY, **{"X-Request-Timeout": "0.1"})
            assert (status, answer["error"]["code"]) == (503, "queue_timeout")
            served.workers.release()
            assert (await first)[0] == 200

    asyncio.run(main())


def test_a_key_that_fills_its_share_of_the_queue_gets_429_and_others_are_served(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, queue=8, keys=("greedy", "modest"), engine={"key_share": 0.5}) as served:
            tasks = [await held(served, **bearer("greedy"))]
            tasks.append(asyncio.create_task(served.post(TEXT, {**BODY, "n": 4}, **bearer("greedy"))))
            await waiting(served, 4)
            async with served.session.post(served.url + TEXT, json=BODY, headers=bearer("greedy")) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (429, "rate_limit_exceeded")
                assert error["type"] == "rate_limit_error" and int(response.headers["Retry-After"]) >= 1
            tasks.append(asyncio.create_task(served.post(TEXT, {**BODY, "n": 4}, **bearer("modest"))))
            await waiting(served, 8)
            status, answer = await served.post(TEXT, BODY, **bearer("modest"))
            assert (status, answer["error"]["code"]) == (503, "queue_full")
            core = served.engine.core
            assert core is not None and core.waiting.waiting("1") == core.waiting.waiting("2") == 4
            served.workers.release()
            assert all(status == 200 for status, _ in await asyncio.gather(*tasks))

    asyncio.run(main())


def test_what_scheduling_costs_is_in_the_metrics(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            await served.post(TEXT, BODY)
            async with served.session.get(served.url + "/metrics") as response:
                text = await response.text()
            figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            assert (
                float(figures["aiollm_scheduler_seconds_sum"]) > float(figures["aiollm_prefix_index_seconds_sum"]) > 0
            )
            iterations = float(figures["aiollm_iteration_seconds_count"])
            assert float(figures["aiollm_scheduler_seconds_count"]) == iterations
            for name in ("queue_drain_rate", "num_tokens_waiting", "prefix_cache_nodes", "chunk_budget"):
                assert f"aiollm_{name}" in figures

    asyncio.run(main())
