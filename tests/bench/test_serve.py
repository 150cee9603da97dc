"""The whole client against a real server: client processes, table, files."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer

import aiollm.__main__
from aiollm.bench.options import parse, points, workload
from aiollm.bench.serve import REAL_LIFE, _ask_model, main, runs
from aiollm.bench.workloads import LoadError

COMMON = ["--token-ids", "97:123", "--procs", "2", "--random-input-len", "12", "--random-output-len", "9"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    runner = Runner(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    yield runner
    runner.close()


def bench(served: Runner, *argv: str) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        args = parse(["--base-url", served.stand.url, *COMMON, *argv])
        return await runs(args, [workload(args, point) for point in range(points(args))])

    served.stand.workers.say("x" * 60)
    return served.run(run())


def test_requests_are_shared_among_processes_and_counted_together(
    served: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = bench(served, "--num-prompts", "7", "--max-concurrency", "3", "--metric-percentiles", "50,99")
    assert (run["completed"], run["failed"], run["client_processes"]) == (7, 0, 2)
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (7 * 12, 7 * 9)
    assert run["max_concurrent_requests"] <= 3 and run["model_id"] == "tiny"
    assert 0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] <= run["p99_e2el_ms"]
    printed = capsys.readouterr().out
    assert "Successful requests:                     7" in printed and "P50 TTFT (ms):" in printed


def test_a_rate_spreads_requests_over_time(served: Runner) -> None:
    (run,) = bench(served, "--num-prompts", "12", "--request-rate", "60")
    assert run["completed"] == 12 and run["duration"] > 0.08


def test_a_rate_and_a_limit_hold_together(served: Runner) -> None:
    load = ["--num-prompts", "8", "--request-rate", "200", "--max-concurrency", "1", "--procs", "1"]
    (run,) = bench(served, *load)
    assert run["completed"] == 8 and run["max_concurrent_requests"] == 1


def test_several_loads_are_run_in_turn(served: Runner, tmp_path: Path) -> None:
    path = tmp_path / "out" / "runs.jsonl"
    loads = ["--max-concurrency", "1", "2", "--num-prompts", "4", "--result-dir", str(path.parent)]
    for _ in range(2):  # the second run takes the place of the first
        found = bench(served, *loads, "--result-filename", path.name, "--metadata", "gpu=none")
    assert [run["max_concurrency"] for run in found] == [1, 2]
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == found and kept[0]["gpu"] == "none"


def test_no_load_finds_the_prompts_of_another_in_the_cache(served: Runner) -> None:
    loads = ["--max-concurrency", "1", "2", "4", "--num-prompts", "8", "--token-ids", "0:250", "--seed", "5"]
    found = bench(served, *loads)
    assert [run["total_input_tokens"] for run in found] == [8 * 12] * 3
    assert all(run["total_cached_tokens"] < 8 for run in found), "a first token may be that of another prompt"


def test_conversations_take_their_answers_along(served: Runner) -> None:
    turns = ["--dataset-name", "multi_turn", "--multi-turn-num-turns", "3", "--random-prefix-len", "16"]
    (run,) = bench(served, *turns, "--num-prompts", "6", "--max-concurrency", "2")
    # The first prompt of each is 16 + 12 tokens; each later one has the answer of 9 before it and 12 more.
    assert run["total_input_tokens"] == 2 * (28 + 49 + 70)
    assert run["total_cached_tokens"] >= 2 * (28 + 49 - 4), "what was said is in the cache"


def test_texts_are_asked_as_chats(served: Runner, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello", "output_tokens": 5}\n')
    texts = ["--backend", "openai-chat", "--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "2"]
    (run,) = bench(served, *texts, "--num-warmups", "1", "--custom-output-len", "-1")
    assert (run["completed"], run["total_output_tokens"]) == (2, 10)


def test_a_model_may_have_a_second_name_for_requests(served: Runner) -> None:
    (run,) = bench(served, "--model", "org/large", "--served-model-name", "tiny", "--num-prompts", "2")
    assert (run["completed"], run["model_id"]) == (2, "org/large")


def test_a_ramp_is_kept_with_the_figures(
    served: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("aiollm.bench.serve.PROGRESS_SECONDS", 0.0)
    ramp = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "50", "--ramp-up-end-rps", "200"]
    (run,) = bench(served, *ramp, "--num-prompts", "9", "--save-result", "--result-dir", str(tmp_path))
    assert "of 9 requests" in capsys.readouterr().err
    assert run["completed"] == 9 and run["duration"] > 8 / 200
    assert (run["ramp_up_strategy"], run["ramp_up_start_rps"], run["ramp_up_end_rps"]) == ("linear", 50.0, 200.0)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("openai-ramp-up-linear-50qps-200qps-tiny-")
    bench(served, "--num-prompts", "9", "--disable-tqdm")
    assert "of 9 requests" not in capsys.readouterr().err


def test_warming_up_with_chats_leaves_none_of_the_prompts_in_the_cache(served: Runner, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "w" * 100, "output_tokens": 5}))
    texts = ["--backend", "openai-chat", "--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "1"]
    (run,) = bench(served, *texts, "--num-warmups", "1", "--custom-output-len", "-1")
    assert run["total_input_tokens"] > 100 > run["total_cached_tokens"]


def test_real_life_asks_for_what_users_ask_for(served: Runner) -> None:
    assert REAL_LIFE.keys() >= {"stop", "presence_penalty", "logprobs"} and REAL_LIFE["ignore_eos"] is False
    (run,) = bench(served, "--real-life", "--num-prompts", "20", "--max-concurrency", "2")
    assert run["completed"] == 20 and run["real_life"] is True
    assert run["total_cached_tokens"] >= 12 * 5, "half of each prompt is one of 8 texts"


def test_failures_are_counted_and_said(served: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = bench(
        served, "--num-prompts", "3", "--extra-body", '{"top_p": 7}', "--save-detailed",
        "--result-filename", str(tmp_path / "r.json"),
    )  # fmt: skip
    assert (run["completed"], run["failed"], run["output_throughput"]) == (0, 3, 0)
    assert "3 x status 400" in capsys.readouterr().err
    assert "top_p" in json.loads((tmp_path / "r.json").read_text())["errors"][0]


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (["--max-concurrency", "2"], "openai-infqps-concurrency2-tiny-"),
        (["--request-rate", "500", "--label", "mine"], "mine-500.0qps-tiny-"),
    ],
)
def test_a_file_is_called_as_by_vllm(served: Runner, tmp_path: Path, load: list[str], name: str) -> None:
    bench(served, "--num-prompts", "2", *load, "--append-result", "--result-dir", str(tmp_path))
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(name)


def test_a_server_that_loads_is_waited_for_though_its_model_is_named() -> None:
    """Where it lists no models, it need not."""
    answers = iter([(503, {}), (200, {"data": [{"id": "other", "max_model_len": None}]})])

    async def models(request: web.Request) -> web.Response:
        status, body = next(answers, (404, {}))
        return web.json_response(body, status=status)

    async def ask() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        async with TestServer(app) as server:
            root = str(server.make_url("")).rstrip("/")
            assert await _ask_model(root, {}, 30.0, "mine") == "mine"
            assert next(answers, None) is None
            with pytest.raises(LoadError, match="answers 404"):
                await _ask_model(root, {}, 30.0, None)
        assert await _ask_model(root, {}, 0.0, "mine") == "mine", "nobody is asked"
        with pytest.raises(LoadError, match="cannot be reached"):
            await _ask_model(root, {}, 0.01, "mine")

    asyncio.run(ask())


def test_a_picture_is_drawn_over_the_loads(served: Runner, tmp_path: Path) -> None:
    from aiollm.bench.plot import draw

    found = bench(served, "--max-concurrency", "1", "2", "--num-prompts", "3")
    draw(tmp_path / "load.png", found)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--workload", "single", "--dataset-name", "sharegpt"], "--workload"),
        (["--workload", "single", "--random_input_len", "5"], "--workload"),
        (["--dataset-name", "lengths"], "--dataset-path"),
        (["--max-concurrency", "1", "2", "--request-rate", "1", "2", "3"], "--request-rate"),
    ],
)
def test_what_contradicts_itself_is_refused(argv: list[str], said: str) -> None:
    args = parse(argv)
    with pytest.raises(LoadError, match=said):
        [workload(args, point) for point in range(points(args))]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num-prompts", "0"], "at least 1"),
        (["--random-range-ratio", "1.5"], "from 0 to 1"),
        (["--random-range-ratio", '{"input": 2}'], "from 0 to 1"),
        (["--random-range-ratio", '{"prompt": 0.2}'], "only input and output"),
        (["--custom-output-len", "0"], "at least 1"),
        (["--token-ids", "9:3"], "LOW:HIGH"),
        (["--goodput", "speed:3"], "METRIC:MS"),
        (["--header", "x"], "KEY=VALUE"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--extra-body", "{"], "JSON object"),
        (["--percentile-metrics", "ttft,x"], "only ttft"),
        (["--metric-percentiles", "101"], "from 0 to 100"),
        (["--workload", "none"], "decode-256"),
        (["--num-prompt", "5"], "unrecognized"),
    ],
)
def test_a_wrong_value_is_named(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert said in capsys.readouterr().err


def test_bench_alone_says_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["aiollm", "bench", "--help"])
    assert aiollm.__main__.main() == 0
    assert "serve|static" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["aiollm", "bench"])
    assert aiollm.__main__.main() == 2
    assert "serve|static" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--ready-check-timeout-sec", "0"]) == 2
    assert "--ready-check-timeout-sec" in capsys.readouterr().err


def test_without_matplotlib_a_picture_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--plot", "x.png"]) == 2
    assert "aiollm[bench]" in capsys.readouterr().err


def test_a_client_that_dies_ends_the_run(served: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiollm.bench.serve.CLIENT", ("-c", "raise SystemExit(3)"))
    with pytest.raises(LoadError, match="client process"):
        bench(served, "--num-prompts", "2")
