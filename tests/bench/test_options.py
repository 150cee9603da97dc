"""What options are taken, what they ask requests for, and what is said of those that are not had."""

import json
from pathlib import Path
from typing import Any

import pytest

from aiollm.bench import peer_options
from aiollm.bench.options import DATASETS, drawn, parse, parser, points, workload
from aiollm.bench.serve import REAL_LIFE, Progress, body_of
from aiollm.bench.workloads import Draw, LoadError, Ramp, jobs


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What is said where they are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def body(*argv: str) -> dict[str, Any]:
    return body_of(parse(argv), "tiny")


@pytest.mark.parametrize("name", peer_options.NO_EFFECT)
def test_options_without_effect_are_answered_with_the_reason(capsys: pytest.CaptureFixture[str], name: str) -> None:
    option = peer_options.NO_EFFECT[name]
    parse([f"--{name}", *(["x"] if option.unit else []), "--seed", "3"])
    assert capsys.readouterr().err == f"aiollm: --{name} has no effect: {option.reason}\n"


@pytest.mark.parametrize("name", peer_options.NOT_HERE)
def test_options_that_ask_for_what_is_not_there_are_refused_with_the_reason(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    option = peer_options.NOT_HERE[name]
    said = refusal(capsys, [f"--{name.replace('-', '_')}", *(["x"] if option.unit else [])])
    assert f"--{name} cannot be had: {option.reason}" in said


def test_no_option_has_two_meanings() -> None:
    own = {word for action in parser()._actions for word in action.option_strings}
    assert not peer_options.NO_EFFECT.keys() & peer_options.NOT_HERE.keys()
    assert own >= {f"--{name}" for name in peer_options.NO_EFFECT | peer_options.NOT_HERE}


@pytest.mark.parametrize("name", [*peer_options.DATASETS, "other"])
def test_a_dataset_that_is_not_here_is_refused_with_the_reason_and_those_that_are(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    said = refusal(capsys, ["--dataset-name", name])
    assert f"{name} is not here: {peer_options.DATASETS.get(name, 'it is not known')}" in said
    assert ", ".join(DATASETS) in said


def test_every_value_has_a_unit_in_the_help() -> None:
    for action in parser()._actions:
        if action.nargs != 0 and not action.choices and action.dest != "host":
            assert action.metavar and action.metavar != "N", f"{action.option_strings} has no unit"


def test_sampling_options_are_fields_of_every_request() -> None:
    assert body() == {
        "model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "temperature": 1.0,
        "ignore_eos": True,
    }  # fmt: skip
    asked = [
        "--min-p", "0.1", "--presence-penalty", "-1", "--frequency-penalty", "0.5", "--repetition-penalty", "1.1",
        "--logprobs", "3", "--temperature", "0", "--no-ignore-eos",
    ]  # fmt: skip
    expected = {
        "min_p": 0.1, "presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 3,
        "temperature": 0.0, "ignore_eos": False,
    }  # fmt: skip
    assert body(*asked).items() >= expected.items()
    assert body("--extra-body", '{"min_p": 0.2}', "--min-p", "0.1")["min_p"] == 0.2


def test_chats_ask_for_logprobs_in_their_own_way() -> None:
    assert body("--backend", "openai-chat", "--logprobs", "3").items() >= {"logprobs": True, "top_logprobs": 3}.items()
    assert body("--endpoint-type", "openai-chat", "--real-life")["top_logprobs"] == REAL_LIFE["logprobs"]


def test_what_is_asked_for_wins_over_real_life() -> None:
    assert body("--real-life").items() >= REAL_LIFE.items()
    assert body("--real-life", "--top-p", "0.5", "--temperature", "1", "--logprobs", "0").items() >= {
        **REAL_LIFE, "top_p": 0.5, "temperature": 1.0, "logprobs": 0,
    }.items()  # fmt: skip


def test_a_length_for_every_dataset_wins_over_that_of_one(tmp_path: Path) -> None:
    args = parse(["--input-len", "40", "--output_len", "30", "--random-output-len", "5"])
    assert (args.random_input_len, args.random_output_len, args.sharegpt_output_len) == (40, 30, 30)
    assert (args.custom_output_len, args.prefix_repetition_output_len) == (30, 30)
    (job,) = jobs(workload(args, 0)._replace(requests=1), Draw(0, 1, 9))
    assert (len(job.turns[0].prompt), job.turns[0].output) == (40, 30)
    path = tmp_path / "lengths.json"
    path.write_text("[[3, 4]]")
    args = parse(["--dataset-name", "lengths", "--dataset-path", str(path), "--output-len", "9", "--num-prompts", "1"])
    assert [job.turns[0].output for job in drawn(args, workload(args, 0), 0)] == [9]


def test_headers_may_follow_one_another() -> None:
    assert parse(["--header", "a=1", "b=2=3", "--header", "c=4"]).header == [("a", "1"), ("b", "2=3"), ("c", "4")]
    assert parse(["--header", "--metadata"]).header == []


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("0.3", (0.3, 0.3)), ('{"input": 0.3, "output": 1}', (0.3, 1.0)), (' {"output": 0.5}', (0.0, 0.5))],
)
def test_prompts_and_answers_may_vary_by_shares_of_their_own(text: str, ratio: tuple[float, float]) -> None:
    assert parse(["--random-range-ratio", text]).random_range_ratio == ratio


def test_texts_are_drawn_by_the_seed_unless_the_order_of_the_file_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = [f"text {at}" for at in range(30)]
    path.write_text("".join(json.dumps({"prompt": text, "output_tokens": 7}) + "\n" for text in texts))

    def asked(*argv: str) -> list[tuple[object, int]]:
        args = parse(["--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "30", *argv])
        return [(job.turns[0].prompt, job.turns[0].output) for job in drawn(args, workload(args, 0), 0)]

    assert asked("--disable-shuffle") == [(text, 256) for text in texts]
    assert asked("--disable-shuffle", "--custom-output-len", "-1") == [(text, 7) for text in texts]
    assert asked("--seed", "1") == asked("--seed", "1") != asked("--seed", "2")
    assert sorted(asked("--seed", "1")) == sorted(asked("--disable-shuffle"))


def test_a_ramp_takes_the_place_of_a_rate() -> None:
    ramp = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "2", "--ramp_up_end_rps", "50"]
    load = workload(parse([*ramp, "--workload", "sharegpt"]), 0)
    assert (load.rate, load.ramp) == (None, Ramp("exponential", 2.0, 50.0))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps and --ramp-up-end-rps"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "2"], "needs --ramp-up-start-rps"),
        (["--ramp-up-start-rps", "2"], "need --ramp-up-strategy"),
        (["--ramp-up-end-rps", "2"], "need --ramp-up-strategy"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "3", "--ramp-up-end-rps", "2"], "not be more than"),
        (
            ["--ramp-up-strategy=linear", "--ramp-up-start-rps=1", "--ramp-up-end-rps=2", "--request-rate=4"],
            "leave --request-rate out",
        ),
        (["--workload", "sharegpt", "--sharegpt-output-len", "4"], "--workload"),
    ],
)
def test_what_contradicts_itself_is_refused(argv: list[str], said: str) -> None:
    args = parse(argv)
    with pytest.raises(LoadError, match=said):
        [workload(args, point) for point in range(points(args))]


@pytest.mark.parametrize("argv", [["--ramp-up-start-rps", "0"], ["--ramp-up-end-rps", "inf"], ["--min-p", "2"]])
def test_values_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert f"argument {argv[0]}: {argv[1]} must be a number from" in refusal(capsys, argv)


def test_answers_of_conversations_may_all_be_of_one_length() -> None:
    args = parse(["--dataset-name", "sharegpt", "--sharegpt-output-len", "7", "--num-prompts", "5"])
    found = drawn(args, workload(args, 0), 0)
    assert [job.turns[0].output for job in found] == [7] * 5
    args = parse(["--dataset-name", "sharegpt", "--num-prompts", "5"])
    plain = drawn(args, workload(args, 0), 0)
    assert [job.turns[0].prompt for job in found] == [job.turns[0].prompt for job in plain]


@pytest.mark.parametrize("shown", [True, False])
def test_requests_are_counted_on_the_terminal_where_that_is_wanted(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aiollm.bench.serve.PROGRESS_SECONDS", 0.0)
    progress = Progress(9, 2, shown)
    progress.set(0, 2)
    progress.set(1, 3)
    progress.close()
    assert ("5 of 9 requests" in capsys.readouterr().err) is shown
