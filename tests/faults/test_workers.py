"""Workers that die, stand still or fail a step: a fault costs the requests that it hit, and nobody else anything."""

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from calm import FLAGS, under_way, until
from serving import Server
from stand import Stand, stand

TEXT = "/v1/completions"


def complete(server: Server, prompt: list[int]) -> list[int]:
    """Token ids of one completion."""
    body = {
        "prompt": prompt, "max_tokens": 150, "temperature": 0.8, "seed": 1, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    found: list[int] = server.post(TEXT, body)["choices"][0]["token_ids"]
    return found


PROMPTS = [[65 + i, 66] * (5 * i + 1) for i in range(4)]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS], ids=lambda number: number.name)
def test_a_worker_that_crashes_costs_no_token_and_the_log_names_the_signal(
    server: Server, number: signal.Signals
) -> None:
    expected = [complete(server, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = [pool.submit(complete, server, prompt) for prompt in PROMPTS]
        until(lambda: under_way(server) == len(PROMPTS))
        (victim,) = server.workers()
        os.kill(victim, number)
        until(lambda: server.get("/ready")[0] == 503, 5)
        assert server.get("/health")[0] == 200
        assert [tokens.result() for tokens in found] == expected
    assert f"a worker process was ended by signal {int(number)} ({signal.strsignal(number)})" in server.log()
    assert server.workers() != [victim]


def test_a_worker_that_stands_still_for_a_while_loses_nothing(server: Server) -> None:
    expected = complete(server, PROMPTS[1])
    (worker,) = server.workers()
    with ThreadPoolExecutor(1) as pool:
        os.kill(worker, signal.SIGSTOP)
        try:
            found = pool.submit(complete, server, PROMPTS[1])
            until(lambda: under_way(server) == 1)
            assert server.get("/health")[0] == 200
            assert not found.done()
        finally:
            os.kill(worker, signal.SIGCONT)
        assert found.result() == expected
    assert server.workers() == [worker]


@pytest.mark.parametrize("streams", [False, True])
def test_memory_that_lacks_for_a_prompt_costs_that_request_only(folder: Path, streams: bool) -> None:
    """An iteration with its chunk fails as one that runs out of memory does; the row beside it was not in it."""

    async def main() -> None:
        async with stand(folder) as served:
            served.workers.say("still here, and going on for a while")
            served.workers.held = True
            other = asyncio.create_task(served.post(TEXT, {"prompt": "a", "max_tokens": 100, "seed": 0}))
            await running(served, 1)
            served.workers.step()
            hit = asyncio.create_task(ask(served, {"prompt": "b" * 40, "max_tokens": 100, "stream": streams}))
            await running(served, 2)
            served.workers.fail("CUDA out of memory")
            served.workers.release()
            answer = await hit
            assert b'"code":"engine_error"' in answer and b"out of memory" in answer
            assert answer.endswith(b"data: [DONE]\n\n") == streams
            assert (await other)[1]["choices"][0]["text"] == "still here, and going on for a while"

    async def running(served: Stand, rows: int) -> None:
        core = served.engine.core
        assert core is not None
        await served.until(lambda: len(core.ledger.running) == rows)

    async def ask(served: Stand, body: dict[str, Any]) -> bytes:
        async with served.session.post(served.url + TEXT, json=body) as response:
            return await response.read()

    asyncio.run(main())


def test_ctrl_c_ends_a_server_and_its_workers_in_order(folder: Path) -> None:
    """A terminal sends it to the whole group: workers leave it to the server, which lets what runs end."""
    group = "import os, sys; os.setpgrp(); os.execv(sys.argv[1], sys.argv[1:])"
    launcher = [sys.executable, "-c", group, sys.executable]
    with Server("--model_dir", str(folder), *FLAGS, launcher=launcher) as server:
        command = ["curl", "-s", server.url + TEXT, "-d", '{"prompt":"x","max_tokens":400,"ignore_eos":true}']
        client = subprocess.Popen(command, stdout=subprocess.PIPE)
        until(lambda: under_way(server) == 1)
        workers = server.workers()
        os.killpg(server.process.pid, signal.SIGINT)
        answer, _ = client.communicate(timeout=60)
        assert b'"finish_reason":"length"' in answer
        assert server.process.wait(20) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert "Traceback" not in server.log()
