"""The whole product as its users meet it: a server process, its workers, real clients, signals and kills."""

import contextlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from tree import ROOT

from aiollm.kernels.cpu.quantize import exact

README = ROOT / "README.md"
CONTEXT = 2048
FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "20000", "--running_max_req_size", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte tokenizer; it never ends by itself."""
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    return write_byte_tokenizer(made)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS) as running:
        yield running


def complete(server: Server, **fields: Any) -> list[int]:
    """Token ids of one completion."""
    body = {"prompt": [72, 105], "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, **fields}
    found: list[int] = server.post("/v1/completions", body)["choices"][0]["token_ids"]
    return found


def test_the_requests_in_the_readme_are_answered(server: Server) -> None:
    """Each `curl` is sent as it stands there; two are for other models than this one, and say so."""
    commands = re.findall(r"(?m)^    (curl http://127\.0\.0\.1:8000/.*\n(?:     .*\n)*)", README.read_text("utf-8"))
    refused = {}
    for command in commands:
        _, url, *options = shlex.split(command.replace("\\\n", ""))
        assert options[:-1] == ["-H", "Content-Type: application/json", "-d"], command
        path = url.removeprefix("http://127.0.0.1:8000")
        try:
            server.post(path, json.loads(options[-1]))
        except urllib.error.HTTPError as error:
            refused[path] = json.load(error)["error"]
    assert len(commands) == 5
    assert {path: error["code"] for path, error in refused.items()} == {
        "/v1/chat/completions": "unsupported_field", "/get_score": "unsupported_model",
    }  # fmt: skip
    assert "--tool_call_parser" in refused["/v1/chat/completions"]["message"]


def served(server: Server) -> bool:
    """Whether a completion comes, and not a connection that the server turns away."""
    try:
        return len(complete(server)) == 24
    except (ConnectionError, urllib.error.URLError):
        return False


def stream(server: Server, tokens: int) -> subprocess.Popen[bytes]:
    """A streamed completion in curl."""
    body = json.dumps({"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True})
    command = ["curl", "-sN", server.url + "/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def until(condition: Any, seconds: float = 20) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_ready_tells_the_progress_of_loading(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS, ready=False) as server:
        seen = []
        while not seen or seen[-1][0] != 200:
            status, text = server.get("/ready")
            seen.append((status, json.loads(text)))
            assert server.get("/health")[0] == 200
        assert seen[0][0] == 503 and seen[0][1]["status"] == "loading"
        assert {"phase", "progress"} <= seen[0][1].keys()
        assert seen[-1][1]["status"] == "ready"


def test_probes_are_answered_while_the_model_is_still_being_downloaded() -> None:
    """A hub that never answers: the server is there, says so, and refuses the rest."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        with Server("--model_dir", "nobody/nothing", ready=False, environ=hub) as server:
            assert server.get("/health")[0] == 200
            status, text = server.get("/ready")
            assert status == 503 and json.loads(text)["status"] == "loading"
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                complete(server)
            refused.value.close()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0


def test_a_row_draws_the_same_tokens_alone_and_in_a_crowd(server: Server) -> None:
    alone = [complete(server, temperature=1.0, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(complete, server, temperature=1.5, prompt=[1 + i] * (9 * i + 1)) for i in range(8)]
        crowded = list(pool.map(lambda seed: complete(server, temperature=1.0, seed=seed), range(4)))
        assert all(len(other.result()) == 24 for other in others)
    assert crowded == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_choices_of_one_request_are_those_of_following_seeds(server: Server) -> None:
    body = {"prompt": [9, 8, 7], "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1.0, "return_token_ids": True}
    choices = server.post("/v1/completions", body)["choices"]
    for index in range(3):
        assert choices[index]["token_ids"] == complete(
            server, prompt=[9, 8, 7], max_tokens=8, seed=5 + index, temperature=1.0, ignore_eos=False
        )


def test_what_the_model_would_say_scores_as_the_likeliest(server: Server) -> None:
    """As lm-eval asks and reads: the one token that is generated is thrown away."""
    prompts = [[72, 105], [5] * 40, list(range(90))]
    greedy = [complete(server, prompt=prompt, temperature=0) for prompt in prompts]
    whole = [prompt + tokens for prompt, tokens in zip(prompts, greedy, strict=True)]
    body = {"prompt": whole, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "prompt_logprobs": 1}
    first, again = (server.post("/v1/completions", body)["choices"] for _ in range(2))
    assert first == again, "cached or not"
    for choice, prompt, ids in zip(first, prompts, whole, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][len(prompt) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(prompt) : -1]
        assert len(logprobs) == 24 and all(a == max(top.values()) for a, top in zip(logprobs, tops, strict=True))
        told = [scores[str(id)] for scores, id in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)]
        assert [score["logprob"] for score in told] == choice["logprobs"]["token_logprobs"][1:-1]
        assert {score["rank"] for score in told[len(prompt) - 1 :]} == {1}


def test_greedy_choices_are_the_one_that_is_computed(server: Server) -> None:
    before = server.metric("aiollm_generation_tokens_total")
    body = {"prompt": [9, 8, 7], "max_tokens": 8, "n": 4, "temperature": 0, "return_token_ids": True}
    choices = server.post("/v1/completions", {**body, "ignore_eos": True})["choices"]
    assert server.metric("aiollm_generation_tokens_total") - before == 8
    assert [choice["token_ids"] for choice in choices] == [
        complete(server, prompt=[9, 8, 7], max_tokens=8, temperature=0)
    ] * 4


def test_clients_that_go_away_leave_nothing_behind(server: Server) -> None:
    r = random.Random(3)

    def leave(_: int) -> None:
        client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        body = json.dumps({"prompt": "x" * r.randint(1, 900), "max_tokens": 1000, "stream": r.random() < 0.5}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + body[: r.choice([0, 10, len(body)])])
        client.settimeout(r.random())
        with contextlib.suppress(TimeoutError):  # it may leave before the first byte came
            client.recv(r.choice([1, 300, 5000]))
        client.close()

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(leave, range(120)))
    until(lambda: server.metric("aiollm_num_requests_running") + server.metric("aiollm_num_requests_waiting") == 0)
    assert server.get("/ready")[0] == 200
    assert len(complete(server)) == 24


def test_a_killed_worker_costs_no_token(server: Server) -> None:
    prompts = [[65 + i, 66, 67] * (3 * i + 1) for i in range(8)]
    expected = [complete(server, prompt=prompt, max_tokens=200, temperature=0.8, seed=1) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        before = server.metric("aiollm_generation_tokens_total")
        found = [
            pool.submit(complete, server, prompt=prompt, max_tokens=200, temperature=0.8, seed=1) for prompt in prompts
        ]
        until(lambda: server.metric("aiollm_generation_tokens_total") > before + 300)
        (victim,) = server.workers()
        os.kill(victim, signal.SIGKILL)
        until(lambda: server.get("/ready")[0] == 503)
        assert [tokens.result() for tokens in found] == expected
    assert server.get("/ready")[0] == 200
    assert server.workers() != [victim]


def test_a_server_out_of_descriptors_turns_clients_away_says_so_once_and_recovers(folder: Path) -> None:
    launcher = ["prlimit", "--nofile=128", sys.executable]
    with Server("--model_dir", str(folder), *FLAGS, launcher=launcher) as server, contextlib.ExitStack() as clients:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        idle = [clients.enter_context(socket.create_connection(address, timeout=20)) for _ in range(300)]
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle[0].recv(15) == b"HTTP/1.1 200 OK"
        with contextlib.suppress(ConnectionResetError):
            assert idle[-1].recv(1) == b""
        until(lambda: "nearly out of file descriptors" in server.log())
        clients.close()
        until(lambda: served(server))
        assert server.log().count("descriptors") == 1 and "Traceback" not in server.log()


def test_a_server_may_open_as_many_files_as_the_machine_allows(folder: Path) -> None:
    launcher = ["prlimit", "--nofile=64:4096", sys.executable]
    with Server("--model_dir", str(folder), *FLAGS, ready=False, launcher=launcher) as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (4096, 4096)


def test_a_server_with_keys_serves_who_shows_one_and_its_log_shows_none(folder: Path) -> None:
    keys = {"AIOLLM_API_KEY": "first-key,second-key"}
    with Server("--model_dir", str(folder), *FLAGS, "--log_level", "debug", environ=keys) as server:
        assert server.get("/health")[0] == 200 and server.get("/metrics")[0] == 401
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            complete(server)
        refused.value.close()
        for key in ("first-key", "second-key"):
            with openai.OpenAI(base_url=server.url + "/v1", api_key=key) as client:
                name = client.models.list().data[0].id
                assert client.completions.create(model=name, prompt="x", max_tokens=2).usage.completion_tokens == 2  # type: ignore[union-attr]
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="third-key") as client,
            pytest.raises(openai.AuthenticationError) as wrong,
        ):
            client.models.list()
        assert wrong.value.code == "invalid_api_key"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert '"status":401,' in server.log() and "-key" not in server.log()


def test_a_server_open_to_others_without_keys_says_so(folder: Path) -> None:
    said = "whoever reaches this address is served; --api_key asks for a key"
    with Server("--model_dir", str(folder), "--host", "0.0.0.0", ready=False) as server:
        until(lambda: said in server.log())
    with Server("--model_dir", str(folder), "--host", "0.0.0.0", "--api_key", "k", ready=False) as server:
        until(lambda: "model " in server.log())
        assert said not in server.log()


def test_sigterm_drains(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS) as server, stream(server, 1500) as client:
        assert client.stdout is not None
        client.stdout.readline()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready")[0] == 503)
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            complete(server)
        refused.value.close()
        rest = client.stdout.read()
        assert rest.count(b'"finish_reason":"length"') == 1 and rest.endswith(b"data: [DONE]\n\n")
        assert server.process.wait(20) == 0


def test_a_second_sigterm_stops_at_once(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS) as server, stream(server, 2000) as client:
        assert client.stdout is not None
        client.stdout.readline()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready")[0] == 503)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 5


def test_sigterm_while_loading_stops_soon(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS, ready=False) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_server_that_is_killed_takes_its_workers_along(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS) as server:
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))


def start(*flags: str) -> tuple[int, str]:
    """Exit status and last line of a server that cannot start."""
    command = [sys.executable, "-m", "aiollm", "serve", "--port", "0", *flags]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return found.returncode, found.stderr.strip().splitlines()[-1]


def test_a_start_that_fails_says_why_in_its_last_line(folder: Path, tmp_path: Path) -> None:
    status, line = start("--model_dir", str(tmp_path / "nowhere"))
    assert status == 1 and "nowhere" in line

    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    status, line = start("--model_dir", str(tmp_path))
    assert status == 1 and "pickled" in line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, line = start("--model_dir", str(folder), "--port", str(taken.getsockname()[1]))
    assert status == 1 and "--port" in line

    status, line = start("--model_dir", str(folder), "--tp", "4", "--device", "cpu")
    assert status == 1 and "tp 4" in line


def test_a_record_is_replayed_without_a_server(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with Server("--model_dir", str(folder), *FLAGS, "--record", str(record)) as server, ThreadPoolExecutor(4) as pool:
        lengths = [
            len(t) for t in pool.map(lambda i: complete(server, seed=i, prompt=[i + 1] * (50 * i + 1)), range(4))
        ]
    command = [sys.executable, "-m", "aiollm.workers", "--replay", str(record)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert f"{sum(lengths)} tokens, 0 differ" in found.stdout


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The model that is served without any argument."""
    with Server() as running:
        yield running


def test_8_bit_weights_are_the_default_only_where_their_cost_was_measured(demo: Server, folder: Path) -> None:
    told = "(int8)" if exact() else "(fp32)"
    assert f"memory of each worker {told}" in demo.log()
    assert "--data_type fp32 serves full precision" in demo.log() or not exact()
    with Server("--model_dir", str(folder), "--max_total_token_num", "2000") as server:
        assert "memory of each worker (fp32)" in server.log() and "--data_type int8 is faster" in server.log()


@pytest.mark.skipif(not exact(), reason="needs AVX-512 VNNI")
def test_two_ranks_of_8_bit_weights_draw_the_same_tokens_alone_and_in_a_crowd(folder: Path) -> None:
    with Server("--model_dir", str(folder), *FLAGS, "--device", "cpu", "--tp", "2", "--data_type", "int8") as server:
        assert len(server.workers()) == 2 and "memory of each worker (int8)" in server.log()
        alone = [complete(server, temperature=1.0, seed=seed) for seed in range(3)]
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(complete, server, temperature=1.5, prompt=[1 + i] * (9 * i + 1)) for i in range(5)]
            crowded = list(pool.map(lambda seed: complete(server, temperature=1.0, seed=seed), range(3)))
            assert all(len(other.result()) == 24 for other in others)
        assert crowded == alone and len({tuple(tokens) for tokens in alone}) == 3


def test_sampling_that_the_model_brings_may_be_left_out_and_choices_be_fewer(
    demo: Server, folder: Path, tmp_path: Path
) -> None:
    told = "sampling unless a request says otherwise: temperature "
    assert told in demo.log()
    made = shutil.copytree(folder, tmp_path / "model")
    (made / "generation_config.json").write_text('{"temperature": 0.0}')
    with Server("--model_dir", str(made), *FLAGS, "--generation_config", "vllm", "--max_n", "3") as server:
        assert told not in server.log()
        body = {"prompt": [9, 8, 7], "max_tokens": 8, "n": 3, "return_token_ids": True}
        choices = server.post("/v1/completions", body)["choices"]
        assert len({tuple(choice["token_ids"]) for choice in choices}) == 3
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/v1/completions", {**body, "n": 4})
        assert b"n: at most 3 (--max_n)" in refused.value.read()


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_demo_model_answers_curl(demo: Server) -> None:
    body = json.dumps({"messages": QUESTION, "temperature": 0})
    command = ["curl", "-s", demo.url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    plain = json.loads(subprocess.run([*command, body], capture_output=True, check=True).stdout)
    assert "Paris" in plain["choices"][0]["message"]["content"]
    body = json.dumps({"messages": QUESTION, "temperature": 0, "stream": True})
    lines = subprocess.run([*command, body], capture_output=True, check=True, text=True).stdout.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == plain["choices"][0]["message"]["content"]
    assert lines[-2:] == ["data: [DONE]", ""]


def test_the_demo_model_answers_the_openai_package(demo: Server) -> None:
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        plain = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)  # type: ignore[arg-type]
        assert "Paris" in (plain.choices[0].message.content or "")
        assert plain.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(
            model=model,
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        received = list(chunks)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices)
        assert text == plain.choices[0].message.content
        assert received[-1].usage is not None and received[-1].usage == plain.usage.model_copy(  # type: ignore[union-attr]
            update={"prompt_tokens_details": received[-1].usage.prompt_tokens_details}
        )


def test_health_answers_while_long_prompts_are_tokenized(demo: Server) -> None:
    """The loop is never blocked: probes stay quick beside prompts of a megabyte, which are refused as too long."""
    refused = []

    def flood() -> None:
        try:
            demo.post("/v1/completions", {"prompt": "all work and no play " * 20000})
        except urllib.error.HTTPError as error:
            refused.append(json.load(error)["error"]["code"])

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert demo.get("/health")[0] == 200
    assert refused == ["context_length_exceeded"] * 3
