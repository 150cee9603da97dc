"""The chat in a terminal, as a process at the other end of pipes."""

import asyncio
import contextlib
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from echo_workers import EchoWorkers
from stand import Stand, stand
from tiny_tokenizer import write_byte_tokenizer

WAIT = 30  # seconds until a test that hangs fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@contextlib.asynccontextmanager
async def chatting(url: str, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`aiollm chat` with open pipes. It hears Ctrl-C, also where the tests run in a shell's background and do not."""
    pipe = asyncio.subprocess.PIPE
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "aiollm", "chat", "--url", url, *flags, stdin=pipe, stdout=pipe, stderr=pipe, env=environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def piped(url: str, text: str, *flags: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a chat whose user says `text`."""
    async with chatting(url, *flags) as process:
        out, err = await process.communicate(text.encode())
        return process.returncode, out.decode(), err.decode()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WAIT))


def heard(workers: EchoWorkers, *answers: str) -> list[str]:
    """Give these answers, one after the other; the prompts so far, as text."""
    prompts: list[str] = []
    scripts: dict[str, list[int]] = {}

    def reply(prompt: list[int], seed: int) -> list[int]:
        text = bytes(id for id in prompt if id < 256).decode()
        if text not in scripts:
            scripts[text] = list(answers[len(prompts)].encode())
            prompts.append(text)
        return scripts[text]

    workers.reply = reply
    return prompts


def test_each_line_of_a_pipe_is_answered_and_remembered(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            prompts = heard(served.workers, "Hello you.", "Ü🙂", "Fine.")
            status, out, err = await piped(served.url, "hi\n\nhow\nwell?\n", "--system", "be kind")
            assert (status, out, err) == (0, "Hello you.\nÜ🙂\nFine.\n", "")
            assert prompts[0] == "system\nbe kind\nuser\nhi\nassistant\n"
            assert prompts[2].endswith(
                "user\nhi\nassistant\nHello you.\nuser\nhow\nassistant\nÜ🙂\nuser\nwell?\nassistant\n"
            )

    run(main())


def test_what_the_model_thinks_stays_out_of_the_answer(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, reasoning_parser="think") as served:
            prompts = heard(served.workers, "<think>\nHm, \x07hm.\n</think>\nYes.", "No.")
            assert await piped(served.url, "hi\nsure?\n") == (0, "Yes.\nNo.\n", "Hm, hm.\n\n")
            assert "Hm" not in prompts[1]

    run(main())


def test_commands_begin_anew(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            prompts = heard(served.workers, "1", "2", "3", "4")
            said = "a\n/new\nb\n/system be brief\nc\n/system\n/what\nd\n/quit\nnever\n"
            status, out, err = await piped(served.url + "/v1/", said)
            assert (status, out) == (0, "1\n2\n3\n4\n") and err.startswith("/what is none of these:\n/new ")
            assert prompts == [
                "user\na\nassistant\n",
                "user\nb\nassistant\n",
                "system\nbe brief\nuser\nc\nassistant\n",
                "user\nd\nassistant\n",
            ]

    run(main())


def test_flags_reach_the_server(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            heard(served.workers, "abcdef")
            assert (await piped(served.url, "x\n", "--max-tokens", "3", "--model", "org/tiny"))[1] == "abc\n"
            status, out, err = await piped(served.url, "x\ny\n", "--model", "other")
            assert (status, out) == (1, "") and "`other` does not exist" in err and "Traceback" not in err

    run(main())


@pytest.mark.parametrize(
    ("flags", "variable", "status"),
    [
        (["--api_key", "k2"], "", 0),
        (["--api-key", "k1"], "wrong", 0),
        ([], "k1", 0),
        ([], "k2,k1", 0),  # the server's own variable may hold several
        (["--api_key", "wrong"], "k1", 1),
        ([], "", 1),
    ],
)
def test_a_server_with_keys_is_shown_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], variable: str, status: int
) -> None:
    monkeypatch.setenv("AIOLLM_API_KEY", variable)

    async def main() -> None:
        async with stand(folder, keys=("k1", "k2")) as served:
            heard(served.workers, "let in")
            found, out, err = await piped(served.url, "x\n", *flags)
            assert (found, out) == ((0, "let in\n") if status == 0 else (1, "")), err
            assert status == 0 or ("API key" in err and "wrong" not in err and "Traceback" not in err)

    run(main())


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served, chatting(served.url) as process:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            prompts = heard(served.workers, "x" * 400, "yes")
            served.workers.held = True
            process.stdin.write(b"long\n")
            core = served.engine.core
            await served.until(lambda: core is not None and bool(core.ledger.running))
            for _ in range(3):
                served.workers.step()
            assert (await process.stdout.readexactly(3)) == b"xxx"
            process.send_signal(signal.SIGINT)
            await process.stderr.readuntil(b"[stopped]")
            served.workers.release()
            process.stdin.write(b"more?\n/quit\n")
            out = await process.stdout.read()
            assert out == b"\nyes\n"
            assert await process.wait() == 0
            assert prompts[1] == "user\nlong\nassistant\nxxx\nuser\nmore?\nassistant\n"

    run(main())


def test_what_would_control_the_terminal_is_left_out(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder) as served:
            heard(served.workers, "\x1b[31mred\x07\r\n\tend\x9b")
            assert (await piped(served.url, "x\n"))[1] == "[31mred\n\tend\n"

    run(main())


def test_it_waits_for_a_server_that_loads(folder: Path) -> None:
    async def main() -> None:
        async with stand(folder, loading=True) as served, chatting(served.url) as process:
            assert process.stderr is not None
            assert await process.stderr.readline() == b"the server is loading: starting\n"
            served.start()
            heard(served.workers, "ready now")
            assert (await process.communicate(b"hi\n"))[0] == b"ready now\n"

    run(main())


def test_an_error_amid_an_answer_ends_a_pipe(folder: Path) -> None:
    async def fail(served: Stand) -> None:
        core = served.engine.core
        await served.until(lambda: core is not None and bool(core.ledger.running))
        served.engine.on_stopped("the model fell over")
        served.workers.release()

    async def main() -> None:
        async with stand(folder) as served:
            heard(served.workers, "x" * 400)
            served.workers.held = True
            (status, _, err), _ = await asyncio.gather(piped(served.url, "x\ny\n"), fail(served))
            assert status == 1 and err == "aiollm: the model fell over\n"

    run(main())


def test_a_terminal_gets_prompts_and_goes_on_after_an_error(folder: Path) -> None:
    async def main() -> None:
        ours, theirs = pty.openpty()
        async with stand(folder) as served:
            heard(served.workers, "good day")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "aiollm", "chat", "--url", served.url,
                stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"},
            )  # fmt: skip
            os.close(theirs)
            await shown(ours, "leave, as Ctrl-D does\r\n\r\n> ")
            os.write(ours, b"x" * 600 + b"\n")
            assert "maximum context length" in await shown(ours, "\r\n> ")
            os.write(ours, b"hi\n")
            assert "good day\r\n> " in await shown(ours, "day\r\n> ")
            os.write(ours, b"\x04")
            assert await process.wait() == 0
        os.close(ours)

    run(main())


async def shown(terminal: int, end: str) -> str:
    """What the terminal shows up to `end`."""
    text = ""
    while not text.endswith(end):
        text += (await asyncio.to_thread(os.read, terminal, 4096)).decode()
    return text


def test_without_a_server_it_says_what_to_do() -> None:
    async def main() -> None:
        status, out, err = await piped("http://127.0.0.1:9", "hi\n")
        assert (status, out) == (1, "")
        assert "no server answers at http://127.0.0.1:9" in err and "aiollm serve" in err and "Traceback" not in err

    run(main())
