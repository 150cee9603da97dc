"""Conversations of a file: which are taken, in which order, and how they are asked."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer

from aiollm.bench.options import parse, points, workload
from aiollm.bench.serve import runs
from aiollm.bench.sharegpt import AT_ONCE, fits, read, take
from aiollm.bench.workloads import LoadError, Turn


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    runner = Runner(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    yield runner
    runner.close()


def written(path: Path, said: list[tuple[str, ...]]) -> Path:
    """A file like ShareGPT's."""
    speakers = ("human", "gpt", "human")
    entries = [
        {"id": "x", "conversations": [{"from": f, "value": v} for f, v in zip(speakers, texts, strict=False)]}
        for texts in said
    ]
    path.write_text(json.dumps(entries))
    return path


def bench(served: Runner, path: Path, *argv: str) -> list[dict[str, Any]]:
    common = ["--base-url", served.stand.url, "--procs", "2", "--dataset-name", "sharegpt", "--dataset-path", str(path)]
    args = parse([*common, *argv])
    served.stand.workers.say("x" * 60)
    return served.run(runs(args, [workload(args, point) for point in range(points(args))]))


def test_the_first_prompt_and_its_answer_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [("hello", "world", "more"), ("alone",), (), ("two", "words")])
    assert read(path) == [("hello", "world"), ("two", "words")]


def test_a_file_of_lengths_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text("[[3, 4], [5, 6]]")
    assert read(path) is None


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"conversations": 3}]', '[{"conversations": [{"from": "gpt"}]}]', '[[3, 4], {"id": "x"}]'],
)
def test_a_file_of_neither_is_refused_by_the_options_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(LoadError, match="--dataset-path"):
        read(path)
    with pytest.raises(LoadError, match="--dataset-path"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("prompt", "output", "given", "taken"),
    [
        (4, 4, False, True),
        (3, 4, False, False),
        (4, 3, False, False),
        (4, 1, True, True),
        (3, 1, True, False),
        (1024, 1024, False, True),
        (1025, 4, False, False),
        (1024, 1025, False, False),
        (1000, 1049, True, False),
    ],
)
def test_conversations_are_taken_within_vllms_limits(prompt: int, output: int, given: bool, taken: bool) -> None:
    assert fits(prompt, output, given) is taken


def test_as_many_as_are_wanted_are_taken_and_no_more_counted() -> None:
    counted = 0

    async def count(text: str) -> int:
        nonlocal counted
        counted += 1
        return len(text)

    said = [("p" * (3 + at % 2), "a" * 9) for at in range(4 * AT_ONCE)]
    assert asyncio.run(take(said, 10, None, count)) == [Turn("pppp", 9)] * 10
    assert counted == 2 * AT_ONCE
    assert len(asyncio.run(take(said, 10_000, None, count))) == 2 * AT_ONCE, "all that fit"


def test_answers_of_a_given_length_are_not_counted() -> None:
    async def count(text: str) -> int:
        assert text == "prompt"
        return 6

    assert asyncio.run(take([("prompt", "a")], 1, 2, count)) == [Turn("prompt", 2)]
    assert asyncio.run(take([("prompt", "a")], 1, 2043, count)) == [], "together they are too long"


def test_texts_are_asked_and_answers_are_as_long_as_in_the_file(served: Runner, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [("a prompt", "an answer"), ("hi", "too short"), ("another", "four")])
    (run,) = bench(served, path, "--num-prompts", "2")
    assert (run["completed"], run["total_input_tokens"], run["total_output_tokens"]) == (2, 8 + 7, 9 + 4)


def test_the_order_of_the_file_and_one_length_of_answers_may_be_asked_for(served: Runner, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [("p" * (10 + at), "answer") for at in range(20)])
    (run,) = bench(served, path, "--num-prompts", "3", "--disable-shuffle", "--sharegpt-output-len", "2")
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (10 + 11 + 12, 3 * 2)


def test_few_conversations_are_asked_again_and_each_load_has_texts_of_its_own(
    served: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.json", [("a prompt of some length", "answer"), ("another prompt", "answer")])
    found = bench(served, path, "--num-prompts", "4", "--max-concurrency", "1", "2")
    assert "2 conversations fit" in capsys.readouterr().err
    texts = 2 * (len("a prompt of some length") + len("another prompt"))
    assert [run["total_input_tokens"] for run in found] == [texts, texts + 4 * len("2. ")]


def test_conversations_are_asked_as_chats(served: Runner, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [("a prompt", "an answer")])
    (run,) = bench(served, path, "--num-prompts", "1", "--backend", "openai-chat")
    assert (run["completed"], run["total_output_tokens"]) == (1, 9)


@pytest.mark.parametrize("said", [("hi", "ho"), ("p" * 100_000, "answer")])
def test_a_file_without_a_conversation_that_fits_is_refused(
    served: Runner, tmp_path: Path, said: tuple[str, str]
) -> None:
    with pytest.raises(LoadError, match="--dataset-path: no conversation"):
        bench(served, written(tmp_path / "a.json", [said]))


def test_a_server_that_does_not_count_is_named(served: Runner, tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", [("a prompt", "an answer")])
    with pytest.raises(LoadError, match=r"/tokenize, which is to count .* answers 404"):
        bench(served, path, "--model", "another")


def test_lengths_are_read_as_before(served: Runner, tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text("[[13, 4], [15, 6]]")
    (run,) = bench(served, path, "--num-prompts", "2", "--token-ids", "97:123")
    assert (run["total_input_tokens"], run["total_output_tokens"]) == (28, 10)
