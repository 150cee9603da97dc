"""Completion scripts: bash's and, where it is installed, fish's are run; zsh's must at least tell of every flag."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aiollm.arguments import COMMANDS
from aiollm.chat import OPTIONS
from aiollm.completion import SHELLS, bash, fish, main
from aiollm.config import FIELDS

SPELLINGS = [name for field in FIELDS.values() for name in (field.name, *field.setting.aliases)]


def complete(folder: Path, *words: str) -> list[str]:
    """What bash proposes for the last word."""
    quoted = " ".join(f"'{word}'" for word in ("aiollm", *words))
    ask = f'{bash()}\nCOMP_WORDS=({quoted}) COMP_CWORD={len(words)}\n_aiollm\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert complete(tmp_path, "") == list(COMMANDS)
    assert complete(tmp_path, "se") == ["serve"]
    assert complete(tmp_path, "serve", "") == complete(tmp_path, "serve", "mo") == ["model.gguf"]
    assert complete(tmp_path, "ba") == ["batch"]
    assert complete(tmp_path, "batch", "mo") == complete(tmp_path, "batch", "in", "") == ["model.gguf"]
    assert complete(tmp_path, "batch", "in", "out", "--tens") == ["--tensor-parallel-size"]
    assert complete(tmp_path, "--por") == complete(tmp_path, "serve", "m", "--por") == ["--port"]
    assert complete(tmp_path, "--max-model") == ["--max-model-len"]
    assert complete(tmp_path, "doctor", "--load_format", "") == ["auto", "dummy"]
    assert complete(tmp_path, "--config", "m") == ["model.gguf"]
    assert complete(tmp_path, "--port", "") == []
    assert complete(tmp_path, "completion", "") == list(SHELLS)
    assert complete(tmp_path, "chat", "--u") == ["--url"]
    assert complete(tmp_path, "chat", "") == []


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("", list(COMMANDS)),
        ("se", ["serve"]),
        ("serve mo", ["model.gguf"]),
        ("batch mo", ["model.gguf"]),
        ("serve --max-model", ["--max-model-len"]),
        ("doctor --load_format ", ["auto", "dummy"]),
        ("--config m", ["model.gguf"]),
        ("serve --port ", []),
        ("completion ", list(SHELLS)),
        ("chat --u", ["--url"]),
    ],
)
def test_fish_completes_commands_flags_values_and_files(tmp_path: Path, typed: str, proposed: list[str]) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "script").write_text(fish())
    ask = f'source script; complete -C "aiollm {typed}"'
    environ = os.environ | {"HOME": str(tmp_path)}
    command = ["fish", "--no-config", "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=True)
    assert sorted(line.split("\t")[0] for line in done.stdout.splitlines()) == sorted(proposed), done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_tells_of_every_flag_and_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([shell]) == 0
    script = capsys.readouterr().out
    dash = "-l " if shell == "fish" else "--"
    assert all(f"{dash}{name}" in script for name in [*SPELLINGS, *OPTIONS, "config", "print_config"])
    assert all(command in script for command in COMMANDS)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_is_sound(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n"], input=SHELLS[shell](), text=True, check=True)


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "bash|zsh|fish" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["tcsh"], ["bash", "zsh"]])
def test_an_unknown_shell_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "bash|zsh|fish" in capsys.readouterr().err
