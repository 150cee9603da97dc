"""`aiollm batch`, mostly as its users meet it: a process, its files, signals; beside a server with the same model."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from children import alive, until, workers
from serving import Server
from stand import ROWS, stand

from aiollm.offline.batch import AHEAD, USAGE, Batch
from aiollm.offline.batch_files import Answers
from aiollm.offline.session import Session

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--max-num-seqs", "8")
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def request(id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": id, "method": "POST", "url": url, "body": body}


def write(path: Path, requests: Sequence[Any]) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in requests))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "aiollm", "batch", *map(str, arguments), *FLAGS]


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and what was said."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def answered(server: Server, item: dict[str, Any]) -> tuple[int, Any]:
    """What a server says, without what is drawn anew each time."""
    try:
        status, body = 200, server.post(item["url"], item["body"])
    except urllib.error.HTTPError as error:
        status, body = error.code, json.load(error)
    return status, anew(body)


def anew(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def test_each_line_is_answered_as_the_server_answers_it(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    requests = [
        request("chat", CHAT, messages=messages, seed=1, max_tokens=9, n=2),
        request("chat/", CHAT + "/", messages=messages, seed=1, max_tokens=2),
        request("logprobs", CHAT, messages=messages, seed=2, max_tokens=3, logprobs=True, top_logprobs=2),
        request("text", prompt=["Hello", "é你"], seed=3, max_tokens=8, return_token_ids=True),
        request("echo", prompt="Hello", temperature=0, max_tokens=0, echo=True, logprobs=1),
        request("vector", EMBEDDINGS, input=["Hello", "é你"], dimensions=4),
        request("model", model="another", prompt="x"),
        request("field", prompt="x", temperature=7),
        request("long", prompt="x" * 3000),
        request("missing", CHAT, max_tokens=3),
        request("tools", CHAT, messages=[{"role": "tool", "content": "x"}]),
        request("nowhere", "/v1/nothing", prompt="x"),
    ]
    out = tmp_path / "out"
    status, said = run(write(tmp_path / "in", requests), out, folder)
    assert status == 3 and "12 answered, 6 with an error; 0 were answered before" in said
    found = {line["custom_id"]: line for line in read(out)}
    assert len(found) == len({line["id"] for line in found.values()}) == len(requests)
    with Server("--model_dir", str(folder), *FLAGS) as server:
        for item in requests:
            line = found[item["custom_id"]]
            response = line["response"]
            assert line["error"] is None and len(response["request_id"]) == 32
            assert (response["status_code"], numbers_cut(anew(response["body"]))) == numbers_cut(answered(server, item))


def numbers_cut(value: Any) -> Any:
    """Without the digits of logprobs that depend on who else is computed, and what was cached."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: numbers_cut(inner) for name, inner in value.items() if name != "cached_tokens"}
    return type(value)(map(numbers_cut, value)) if isinstance(value, list | tuple) else value


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    requests = [request(f"r{i}", prompt=f"{i}", seed=i, max_tokens=100, ignore_eos=True) for i in range(150)]
    source, out = write(tmp_path / "in", requests), tmp_path / "out"
    with subprocess.Popen(command(source, out, folder), stderr=subprocess.DEVNULL) as process:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") > 20)
        (worker,) = workers(process.pid)
        process.kill()
        process.wait()
    until(lambda: not alive(worker))
    first = out.read_bytes()
    kept = first.count(b"\n")
    assert 20 < kept < 150
    out.write_bytes(first + b'{"id":"batch_req_12345","custom_id":"r1')  # as a kill may leave it
    status, said = run(source, out, folder)
    assert status == 0 and f"{150 - kept} answered, 0 with an error; {kept} were answered before" in said
    assert out.read_bytes().startswith(first)
    assert sorted(line["custom_id"] for line in read(out)) == sorted(f"r{i}" for i in range(150))
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in read(out)} == {100}
    status, said = run(source, out, folder)
    assert status == 0 and "0 answered, 0 with an error; 150 were answered before" in said


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_whole_lines_and_no_worker(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    requests = [request(f"r{i}", prompt=f"{i}", max_tokens=5 + 100 * (i > 10), ignore_eos=True) for i in range(500)]
    source, out = write(tmp_path / "in", requests), tmp_path / "out"
    with subprocess.Popen(command(source, out, folder), stderr=subprocess.PIPE, text=True) as process:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") > 5)
        (worker,) = workers(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in said and "Traceback" not in said
    assert not alive(worker)
    assert all(line["response"]["status_code"] == 200 for line in read(out))


def test_a_run_without_workers_breaks_off_and_writes_no_error_for_what_it_owes(folder: Path, tmp_path: Path) -> None:
    requests = [request(f"r{i}", prompt=f"{i}", max_tokens=200, ignore_eos=True) for i in range(200)]
    source, out = write(tmp_path / "in", requests), tmp_path / "out"
    started = command(source, out, folder, "--max_restarts", "0")
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") > 5)
        (worker,) = workers(process.pid)
        os.kill(worker, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.rstrip().splitlines()[-1].startswith("aiollm: a worker process was ended")
    assert all(line["response"]["status_code"] == 200 for line in read(out))


def test_lines_that_are_no_requests_are_told_and_stop_nothing(folder: Path, tmp_path: Path) -> None:
    requests = [
        "nonsense", "", json.dumps({"url": COMPLETIONS}), request("a", prompt="x", max_tokens=2),
        request("a", prompt="y"), {"custom_id": "b", "url": COMPLETIONS},
        {**request("c", prompt="x"), "method": "GET"}, request("d", prompt="x", stream=True),
        request("e", prompt="x", max_tokens=2), {**request("f", prompt="x", max_tokens=2), "method": "post"},
    ]  # fmt: skip
    source, out = write(tmp_path / "in", requests), tmp_path / "out"
    assert run(source, out, folder)[0] == 3
    lines = read(out)
    wrong = {line["error"]["line"]: line["error"]["code"] for line in lines if line["error"] is not None}
    assert wrong == {1: "invalid_json_line", 3: "invalid_line", 5: "duplicate_custom_id"}
    codes = {line["custom_id"]: line["response"]["status_code"] for line in lines if line["error"] is None}
    assert codes == {"a": 200, "b": 400, "c": 405, "d": 400, "e": 200, "f": 200}
    status, said = run(source, out, folder)
    assert status == 3 and "0 answered, 0 with an error; 9 were answered before" in said
    assert read(out) == lines


def test_a_pipe_gets_its_answers_while_it_is_open(folder: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command("-", "-", folder), **pipes) as process:  # type: ignore[call-overload]
        for id in ("a", "b"):
            process.stdin.write(json.dumps(request(id, prompt="x", max_tokens=2)).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["custom_id"] == id
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait(30) == 0


def test_a_run_that_cannot_begin_says_why(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [request("a", prompt="x")])
    for arguments, text in (
        ((tmp_path / "nothing", tmp_path / "out", folder), "nothing"),
        ((source, source, folder), "line 1 is no answer of a batch"),
        ((source, tmp_path / "out", tmp_path / "nowhere"), "nowhere"),
    ):
        status, said = run(*arguments)
        assert status == 1 and text in said.splitlines()[-1] and "Traceback" not in said
    assert run(source) == (2, USAGE + "\n")
    assert run("--port", source) == (2, USAGE + "\n")
    assert run("--help")[0] == 0
    assert read(source) == [request("a", prompt="x")]


def test_a_line_that_was_no_request_is_answered_once_it_is_one(folder: Path, tmp_path: Path) -> None:
    broken = [request("a", prompt="x", max_tokens=2), "nonsense", request("a", prompt="y", max_tokens=2)]
    mended = [request(id, prompt="x", max_tokens=2) for id in "abc"]

    async def main() -> None:
        async with stand(folder) as served:
            runs = [(broken, (3, 2, 0)), (broken, (0, 0, 3)), (mended, (2, 0, 1)), (mended, (0, 0, 3))]
            for requests, counts in runs:
                source = write(tmp_path / "in", requests)
                with source.open("rb") as file, contextlib.closing(Answers(str(tmp_path / "out"))) as answers:
                    batch = Batch(Session(served.parts), answers, None)
                    await batch.run(file)
                    batch.bar.close()
                assert (batch.answered, batch.failed, batch.skipped) == counts

    asyncio.run(main())
    assert sorted(line["custom_id"] for line in read(tmp_path / "out") if line["response"]) == ["a", "b", "c"]


class Counted(io.BytesIO):
    """Counts the lines that were read."""

    lines = 0

    def readline(self, size: int | None = -1) -> bytes:
        self.lines += 1
        return super().readline(size)


def test_no_more_is_read_than_will_soon_be_computed(folder: Path, tmp_path: Path) -> None:
    """A million lines take no more memory than a few, but for their ids."""
    requests = "".join(json.dumps(request(f"{i}", prompt=f"{i}")) + "\n" for i in range(300))

    async def main() -> None:
        async with stand(folder) as served:
            file, answers = Counted(requests.encode()), Answers(str(tmp_path / "out"))
            served.workers.held = True
            batch = Batch(Session(served.parts), answers, None)
            task = asyncio.create_task(batch.run(file))
            most = AHEAD * ROWS
            await served.until(lambda: file.lines > most)
            for _ in range(200):
                await asyncio.sleep(0.001)
            assert file.lines == most + 1 and batch.answered == 0  # the last one read has no room yet
            served.workers.release()
            await task
            assert batch.answered == 300 and batch.failed == 0
            batch.bar.close()
            answers.close()

    asyncio.run(main())
    assert len(read(tmp_path / "out")) == 300
