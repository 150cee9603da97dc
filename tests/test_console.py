"""What a person reads at start: whole lines in a log, one redrawn line on a terminal."""

import io
import re

from aiollm.console import Console, budget, length, precision, sampling
from aiollm.wire.messages import Ready


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_a_phase_and_no_control_characters() -> None:
    out = io.StringIO()
    console = Console(out)
    for fraction in (0.0, 0.5, 1.0):
        console.progress("loading weights", fraction)
    console.progress("warming up", None)
    console.close()
    console.say("ready")
    assert re.fullmatch(r"loading weights: \d+\.\d s\nwarming up: \d+\.\d s\nready\n", out.getvalue())


def test_a_terminal_sees_the_fraction_and_no_rest_of_it() -> None:
    out = Terminal()
    console = Console(out)
    console.progress("loading weights", 0.5)
    assert out.getvalue().endswith("loading weights 50%")
    console.say("done")
    assert out.getvalue().endswith("\r" + " " * len("loading weights 50%") + "\rdone\n")


def test_the_budget_names_every_part_and_the_flags_that_change_it() -> None:
    ready = Ready(
        slots=20000,
        max_length=8192,
        vocabulary=1,
        architecture="a",
        data_type="fp32",
        budget=[("weights", 3 << 30), ("KV cache", 5 << 20)],
        seconds=[],
    )
    text = "\n".join(budget(ready, ready.max_length))
    assert "3.00 GiB" in text and "5.0 MiB" in text and "20,000 tokens, 2.4 requests" in text
    assert "--max_total_token_num" in text and "--max_req_total_len" in text


def test_the_budget_tells_what_layers_with_a_window_keep() -> None:
    ready = Ready(
        slots=3000, max_length=8000, vocabulary=1, architecture="a", data_type="fp32", budget=[("KV cache", 1)],
        seconds=[], window=500, windowed=3,
    )  # fmt: skip
    text = "\n".join(budget(ready, 8000))
    assert "3,000 tokens, 1.3 requests of the longest length (8,000); layers with a window keep the last 500" in text


def test_a_length_that_is_lowered_is_told_with_both_numbers() -> None:
    (line,) = length(100_000, 512)
    assert line.startswith("--max_req_total_len 100000 is lowered to 512, ")
    assert length(0, 512) == length(512, 512) == []


def test_what_was_chosen_on_a_cpu_is_told_with_the_flag_for_the_other_choice() -> None:
    assert "--data_type fp32" in precision("auto", "int8")[0] and "--data_type int8" in precision("auto", "fp32")[0]
    assert precision("int8", "int8") == precision("fp32", "fp32") == precision("auto", "bf16") == []


def test_sampling_that_the_model_brings_is_told_with_the_flag_that_leaves_it_out() -> None:
    (line,) = sampling({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None})
    assert line.endswith(": temperature 0.6, top_p 0.95, top_k 20; --generation_config none leaves it out")
    assert sampling({"temperature": None}) == []
