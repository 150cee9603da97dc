"""Flags, environment and --help, all generated from the settings."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from aiollm import __version__
from aiollm.arguments import given, parse
from aiollm.config import FIELDS, Config, resolved
from aiollm.peer_flags import NO_EFFECT, NOT_HERE


def refusal(capsys: pytest.CaptureFixture[str], argv: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """What stands on stderr where `argv` is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(argv, environ or {})
    assert stopped.value.code == 2
    return capsys.readouterr().err


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    """--help in one line, so that it does not matter where lines break."""
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], {})
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")


def test_no_argument_gives_every_default() -> None:
    assert parse([], {}) == Config()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model_dir", "m"], {"model_dir": "m"}),
        (["--model-dir", "m"], {"model_dir": "m"}),
        (["--model", "m"], {"model_dir": "m"}),
        (["--model=m=1-x"], {"model_dir": "m=1-x"}),
        (["serve", "m"], {"model_dir": "m"}),
        (["serve", "m", "--port", "1"], {"model_dir": "m", "port": 1}),
        (["serve", "--port", "1", "m"], {"model_dir": "m", "port": 1}),
        (["serve", "--port=1"], {"port": 1}),
        (["--served-model-name", "a", "b", "--port", "1"], {"model_name": ("a", "b"), "port": 1}),
        (["--max-model-len", "512"], {"max_req_total_len": 512}),
        (["--gpu-memory-utilization", "0.5"], {"mem_fraction": 0.5}),
        (["--tensor-parallel-size", "2"], {"tp": 2}),
        (["--max-num-seqs", "3"], {"running_max_req_size": 3}),
        (["--max-num-batched-tokens", "100"], {"batch_max_tokens": 100}),
        (["--no-enable-prefix-caching"], {"disable_dynamic_prompt_cache": True}),
        (["--disable_dynamic_prompt_cache"], {"disable_dynamic_prompt_cache": True}),
        (["--dtype", "bfloat16"], {"data_type": "bf16"}),
        (["--dtype", "half"], {"data_type": "fp16"}),
        (["--dtype", "float"], {"data_type": "fp32"}),
        (["--load-format", "safetensors"], {"load_format": "auto"}),
        (["--load-format", "runai_streamer"], {"load_format": "auto"}),
        (["--max-model-len", "16k"], {"max_req_total_len": 16_000}),
        (["--max-model-len", "16K"], {"max_req_total_len": 16_384}),
        (["--max-model-len", "1M"], {"max_req_total_len": 1 << 20}),
        (["--max-model-len", "25.6k"], {"max_req_total_len": 25_600}),
        (["--max-num-batched-tokens", "4k"], {"batch_max_tokens": 4000}),
        (["--max-model-len", "auto"], {"max_req_total_len": 0}),
        (["--data_type", "fp16"], {"data_type": "fp16"}),
        (["--eos_id", "2", "7"], {"eos_id": (2, 7)}),
        (["--drain_timeout", "2.5"], {"drain_timeout": 2.5}),
    ],
)
def test_flags_of_lightllm_and_vllm_set_the_same_settings(argv: Sequence[str], expected: Mapping[str, object]) -> None:
    assert parse(argv, {}) == msgspec.structs.replace(Config(), **expected)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--port", "99999"], ["--port", "99999", "from 0 to 65535"]),
        (["--port", "many"], ["--port", "many", "an integer"]),
        (["--mem_fraction", "0"], ["--mem_fraction", "--gpu-memory-utilization", "above 0 and at most 1"]),
        (["--mem_fraction", "nan"], ["--mem_fraction", "nan"]),
        (["--max-num-seqs", "-1"], ["--running_max_req_size", "--max-num-seqs", "from 0 to 65536"]),
        (["--running_max_req_size", "1000000000"], ["--running_max_req_size", "1000000000", "from 0 to 65536"]),
        (["--dtype", "int4"], ["--data_type", "int4", "auto, fp32, bf16, fp16 or int8"]),
        (["--load-format", "pt"], ["--load_format", "pt", "auto or dummy"]),
        (["--max-model-len", "16kb"], ["--max-model-len", "16kb must be an integer of at least 0"]),
        (["--max-model-len", "1.5K"], ["1.5K must be an integer"]),
        (["--max-num-seqs", "1k"], ["1k must be an integer"]),
        (["--kv-cache-memory-bytes", "1"], ["--kv_cache_memory_bytes 1 cannot be had", "--max_total_token_num"]),
        (["--eos_id", "5", "-1"], ["--eos_id", "5 -1", "at least 0"]),
        (["--port"], ["--port", "expected one argument"]),
        (["--prot", "1"], ["unknown flag --prot", "did you mean --port?"]),
        (["--max-modl-len=1"], ["unknown flag --max-modl-len", "did you mean --max-model-len?"]),
        (["--xyzzy"], ["unknown flag --xyzzy"]),
        (["--dp", "2"], ["--dp 2 cannot be had", "behind a proxy"]),
        (["--por", "1"], ["unknown flag --por"]),
        (["m"], ["unexpected argument m", "aiollm serve m"]),
        (["serve", "a", "b"], ["more than one model: a, b"]),
        (["serve", "a", "--model", "b"], ["more than one model: a, b"]),
    ],
)
def test_a_refusal_names_flag_value_and_range(
    capsys: pytest.CaptureFixture[str], argv: Sequence[str], parts: Sequence[str]
) -> None:
    message = refusal(capsys, argv)
    for part in parts:
        assert part in message
    assert "Traceback" not in message


def test_a_flag_far_from_all_others_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--xyzzy", "--served-workers", "--attention_backend"):
        assert "did you mean" not in refusal(capsys, [flag])


def test_the_environment_sets_what_the_command_line_leaves_open() -> None:
    environ = {
        "AIOLLM_PORT": "9000",
        "AIOLLM_HOST": "::1",
        "AIOLLM_MODEL_NAME": "a, b",
        "AIOLLM_EOS_ID": "1 2",
        "AIOLLM_DISABLE_DYNAMIC_PROMPT_CACHE": "1",
        "AIOLLM_DATA_TYPE": "",
        "PORT": "1",
    }
    config = parse(["--host", "0.0.0.0"], environ)
    expected = Config(
        port=9000, host="0.0.0.0", model_name=("a", "b"), eos_id=(1, 2), disable_dynamic_prompt_cache=True
    )
    assert config == expected


def test_a_bad_variable_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, [], {"AIOLLM_PORT": "tcp://10.0.0.1:80"})
    assert "AIOLLM_PORT: tcp://10.0.0.1:80 must be an integer from 0 to 65535" in message


def test_an_unknown_variable_is_warned_of_and_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([], {"AIOLLM_PROT": "1", "AIOLLM_CACHE_DIR": "/tmp"}) == Config()
    assert capsys.readouterr().err == "aiollm: the variable AIOLLM_PROT is not known; did you mean AIOLLM_PORT?\n"


@pytest.mark.parametrize("name", NO_EFFECT)
def test_flags_without_effect_are_answered_with_the_reason(capsys: pytest.CaptureFixture[str], name: str) -> None:
    flag = NO_EFFECT[name]
    values = ["x", "y"] if flag.several else ["x"] if flag.unit else []
    for words in [[value] for value in flag.values] or [values]:
        assert parse([f"--{name.replace('_', '-')}", *words], {}) == Config()
        assert flag.reason in capsys.readouterr().err


def test_a_flag_without_effect_has_no_value_that_it_has_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "tokenizer_mode: banana must be auto, fast, slow or mistral"
    assert f"--{message}" in refusal(capsys, ["--tokenizer-mode", "banana"])
    assert message in refusal(capsys, ["--config", write(tmp_path, "tokenizer_mode: banana")])
    assert parse(["--config", write(tmp_path, "tokenizer_mode:")], {}) == Config()


@pytest.mark.parametrize("name", NOT_HERE)
def test_flags_that_ask_for_what_is_not_there_end_the_start_with_the_reason(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flag = NOT_HERE[name]
    for value in flag.values:
        assert parse([f"--{name}", value], {}) == Config()
    message = refusal(capsys, [f"--{name.replace('_', '-')}", *(["x"] if flag.unit else [])])
    assert f"--{name}" in message and flag.reason in message


def test_help_tells_of_every_setting_with_range_default_and_alias(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    for field in FIELDS.values():
        assert f"--{field.name} {field.setting.unit}".strip() in text
        assert all(f"also --{alias}" in text for alias in field.setting.aliases)
        assert field.setting.text in text
    assert "TCP port; 0 takes a free one [an integer from 0 to 65535; default 8000]" in text
    assert "AIOLLM_PORT" in text


def test_no_two_flags_have_one_name() -> None:
    names = [name for field in FIELDS.values() for name in (field.name, *field.setting.aliases)]
    plain = [name.replace("-", "_") for name in [*names, *NO_EFFECT, *NOT_HERE]]
    assert sorted(plain) == sorted(set(plain))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--version"], {})
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"aiollm {__version__}\n"


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(AttributeError):
        Config().port = 1  # type: ignore[misc]


def write(folder: Path, text: str) -> str:
    """The path of a file of settings."""
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1\nhost: a\nmax-model-len: 512\nmodel: m")
    config = parse(["--config", path, "--port", "3"], {"AIOLLM_PORT": "2", "AIOLLM_HOST": "b"})
    assert config == Config(port=3, host="b", max_req_total_len=512, model_dir="m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("eos_id: 7", {"eos_id": (7,)}),
        ("eos-id: [7, 8]\nserved_model_name: é", {"eos_id": (7, 8), "model_name": ("é",)}),
        ("dtype: bfloat16\nmem_fraction: 1\ndisable_dynamic_prompt_cache: yes", {
            "data_type": "bf16", "mem_fraction": 1.0, "disable_dynamic_prompt_cache": True}),
        ("port: '9000'\nhost: null\nrecord:", {"port": 9000}),
        ("max-model-len: 16k", {"max_req_total_len": 16_000}),
    ],
)  # fmt: skip
def test_a_file_sets_what_flags_would(tmp_path: Path, text: str, expected: Mapping[str, object]) -> None:
    assert parse(["--config", write(tmp_path, text)], {}) == msgspec.structs.replace(Config(), **expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prot: 1", ["unknown setting prot", "did you mean port?"]),
        ("max-modl-len: 1", ["did you mean max-model-len?"]),
        ("port: 99999", ["port: 99999", "from 0 to 65535"]),
        ("port: true", ["port: True", "an integer"]),
        ("host: 1.2", ["host: 1.2 must be text"]),
        ("eos_id: [1, x]", ["eos_id: 1 x", "one or more"]),
        ("port: 1\nport: 2", ["line 2: port stands there twice"]),
        ("model: a\nmodel_dir: b", ["model_dir stands there under two names"]),
        ("- port", ["must be a mapping"]),
        ("port: [1", ["line 1"]),
        ("port: !!python/object/apply:os.getpid []", ["python/object"]),
    ],
)
def test_a_bad_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: Sequence[str]
) -> None:
    path = write(tmp_path, text)
    message = refusal(capsys, ["--config", path])
    assert all(part in message for part in [path, *parts]), message


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config nowhere.yaml" in refusal(capsys, ["--config", "nowhere.yaml"])


def test_a_setting_for_what_is_not_there_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(["--config", write(tmp_path, "dp: 1\nenable-lora: false\nquantization:")], {}) == Config()
    assert capsys.readouterr().err == ""
    assert "data-parallel-size 2 cannot be had" in refusal(
        capsys, ["--config", write(tmp_path, "data-parallel-size: 2")]
    )


def test_a_setting_without_effect_in_a_file_gets_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--config", write(tmp_path, "trust-remote-code: true")], {}) == Config()
    assert NO_EFFECT["trust_remote_code"].reason in capsys.readouterr().err


def test_printed_settings_are_a_file_that_sets_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--port", "7", "--eos_id", "1", "2", "--model_name", "a: b", "ü", "--record", "yes", "--host", "::1"]
    with pytest.raises(SystemExit) as stopped:
        parse([*flags, "--print-config"], {"AIOLLM_TP": "2"})
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert parse(["--config", write(tmp_path, printed)], {}) == parse(flags, {"AIOLLM_TP": "2"})


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--api_key", "a1", "b/2=="], {}),
        (["--api-key", "a1", "--api-key", "b/2=="], {}),
        (["--api-key=a1,b/2=="], {"AIOLLM_API_KEY": "c"}),
        ([], {"AIOLLM_API_KEY": "a1, b/2=="}),
        (["--config", "FILE"], {}),
    ],
)
def test_several_keys_may_come_from_flags_the_environment_or_a_file(
    tmp_path: Path, argv: Sequence[str], environ: Mapping[str, str]
) -> None:
    path = write(tmp_path, "api-key: [a1, b/2==]")
    assert parse([path if word == "FILE" else word for word in argv], environ).api_key == ("a1", "b/2==")


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--api_key", "secret1", "--print-config"], {}),
        (["--print_config"], {"AIOLLM_API_KEY": "secret1,secret2"}),
        (["--config", "FILE", "--print_config"], {}),
    ],
)
def test_keys_are_not_printed_and_what_is_printed_instead_is_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: Sequence[str], environ: Mapping[str, str]
) -> None:
    path = write(tmp_path, "api_key: secret1")
    with pytest.raises(SystemExit):
        parse([path if word == "FILE" else word for word in argv], environ)
    printed = capsys.readouterr().out
    assert "secret" not in printed and "api_key: '***'" in printed
    assert "api_key: *** must be" in refusal(capsys, ["--config", write(tmp_path, printed)])


@pytest.mark.parametrize("key", ["", "two words", "s3cret\n", "s3cr\u00e9t", "s3cret" * 200, "***"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str], key: str) -> None:
    message = refusal(capsys, ["--api_key", key])
    assert "--api_key" in message and "visible ASCII" in message and "s3cr" not in message and "words" not in message


@pytest.mark.parametrize("text", ["api_key: [s3cret, b\nport: 1", 'api_key: "s3cret', "api_key: s3cret: x"])
def test_a_broken_file_is_refused_without_the_keys_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    message = refusal(capsys, ["--config", write(tmp_path, text)])
    assert "line " in message and "s3cret" not in message


def test_without_keys_none_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--print_config"], {})
    assert "api_key: []" in capsys.readouterr().out


@pytest.mark.parametrize("origin", ["chat.example", "https://", "https://a.example/", "*", "ftp://a.example", ""])
def test_an_origin_is_a_scheme_and_a_host(capsys: pytest.CaptureFixture[str], origin: str) -> None:
    assert "like https://chat.example" in refusal(capsys, ["--allowed-origins", origin])


def test_the_doctor_takes_the_flags_of_the_server() -> None:
    assert parse(["doctor", "m", "--port", "1"], {}) == parse(["serve", "m", "--port", "1"], {})


def test_a_misspelt_command_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean doctor?" in refusal(capsys, ["docter"])


@pytest.mark.parametrize(
    ("asked", "budget", "chunk"),
    [
        ([], 2048, 2048),
        (["--chunked_prefill_size", "512"], 512, 512),
        (["--batch_max_tokens", "8192"], 8192, 8192),
        (["--batch_max_tokens", "4096", "--chunked_prefill_size", "1024"], 4096, 1024),
        (["--batch_max_tokens", "256", "--chunked_prefill_size", "1024"], 256, 256),
    ],
)
def test_the_tokens_of_an_iteration_and_of_one_prompt_follow_each_other(
    asked: Sequence[str], budget: int, chunk: int
) -> None:
    found = resolved(parse(asked, {}), "cpu")
    assert (found.batch_max_tokens, found.chunked_prefill_size) == (budget, chunk)


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), ("cuda", 1024)])
def test_how_many_requests_run_at_once_depends_on_the_device_unless_it_is_set(device: str, rows: int) -> None:
    assert resolved(parse([], {}), device).running_max_req_size == rows
    assert resolved(parse(["--max-num-seqs", "7"], {}), device).running_max_req_size == 7


def test_a_program_gives_settings_by_any_of_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": "m", "dtype": "bfloat16", "max_model_len": 5, "enforce_eager": True, "model_name": ["a", "b"]}
    expected = {"model_dir": "m", "data_type": "bf16", "max_req_total_len": 5, "disable_cudagraph": True}
    environ = {"AIOLLM_THREADS": "3", "AIOLLM_DTYPE": "", "AIOLLM_MAX_REQ_TOTAL_LEN": "9"}
    found = given(settings | {"revision": None, "trust_remote_code": True}, environ)
    assert found == msgspec.structs.replace(Config(), **expected, model_name=("a", "b"), threads=3)
    assert "trust_remote_code has no effect: code from a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_modl_len": 5}, "unknown setting max_modl_len; did you mean max_model_len?"),
        ({"max_model_len": -1}, "max_model_len: -1 must be an integer of at least 0"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization: 2 must be a number above 0 and at most 1"),
        ({"tp": 1, "tensor_parallel_size": 2}, "tp stands there under two names, one of them tensor_parallel_size"),
        ({}, "AIOLLM_PORT: x must be an integer from 0 to 65535"),
    ],
)
def test_a_program_s_setting_that_is_none_is_an_exception(settings: Mapping[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        given(settings, {"AIOLLM_PORT": "x"})
