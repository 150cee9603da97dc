"""The file of keys: what it may say, and what is told of it where it may not."""

import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from aiollm.api.key_file import MOST_KEYS, Entry, entries, main
from aiollm.api.keys import Keys
from aiollm.yaml_file import located

A, B, C = "a" * 64, "b" * 64, "c" * 64


def read(folder: Path, text: str) -> dict[str, Entry]:
    path = folder / "keys.yaml"
    path.write_text(text)
    return entries("keys.yaml", *located(str(path)))


def test_keys_have_names_digests_and_limits(tmp_path: Path) -> None:
    text = f"""
alice: {{sha256: {A}}}
yes:
  sha256: {B}
  max_requests: 8
  tokens_per_minute: 1000
  min_priority: -5
  shares_cache: true
large: {{sha256: {C}, cache_share: 0.6}}
"""
    assert read(tmp_path, text) == {
        "alice": Entry(sha256=A),
        "yes": Entry(sha256=B, max_requests=8, tokens_per_minute=1000, min_priority=-5, shares_cache=True),
        "large": Entry(sha256=C, cache_share=0.6),
    }
    assert read(tmp_path, "") == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"\n1st: {{sha256: {A}}}", "keys.yaml, line 2: a name is"),
        (f"{'x' * 65}: {{sha256: {A}}}", "line 1: a name is"),
        (f'"a b": {{sha256: {A}}}', "line 1: a name is"),
        (f"a: {A}", "line 1: a: must be like"),
        ("a: {}", "line 1: a: sha256 is missing"),
        ("a: {max_requests: 1}", "line 1: a: sha256 is missing"),
        ("a:\n  sha256: sk-secret", "line 2: a: sha256 must be 64 hexadecimal digits"),
        (f"a:\n  sha256: {A.upper()}", "line 2: a: sha256 must be"),
        (f"a:\n  sha256: {'1' * 64}", "line 2: a: sha256 must be"),
        (f"a:\n  sha256: {A}\n  max_requests: 0", "line 3: a: max_requests must be an integer of at least 1"),
        (f"a:\n  sha256: {A}\n  max_requests: '1'", "line 3: a: max_requests must be"),
        (f"a:\n  sha256: {A}\n  tokens_per_minute: 1.5", "line 3: a: tokens_per_minute must be an integer"),
        (f"a:\n  sha256: {A}\n  min_priority: 101", "line 3: a: min_priority must be an integer from -100 to 100"),
        (f"a:\n  sha256: {A}\n  shares_cache: 1", "line 3: a: shares_cache must be true or false"),
        (f"a:\n  sha256: {A}\n  cache_share: 0", "line 3: a: cache_share must be a number above 0 and at most 1"),
        (f"a:\n  sha256: {A}\n  cache_share: 60%", "line 3: a: cache_share must be a number"),
        (
            f"a:\n  sha256: {A}\n  shares_cache: true\n  cache_share: 0.5",
            "line 4: a: cache_share is for keys that do not share the cache",
        ),
        (f"a:\n  sha256: {A}\n  max_request: 1", "line 3: a: unknown field max_request; there are sha256, max_req"),
        (f"a: {{sha256: {A}}}\nb:\n  sha256: {A}", "line 3: b: sha256 is that of a too"),
        (f"a: {{sha256: {A}}}\na: {{sha256: {B}}}", "line 2: a stands there twice"),
        (
            "".join(f"k{i}: {{sha256: '{i:064x}'}}\n" for i in range(MOST_KEYS + 1)),
            f"{MOST_KEYS + 1} keys, and at most",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_what_is_wrong_is_named_by_line_and_field_and_never_shown(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        read(tmp_path, text)
    assert "secret" not in str(refused.value)


def test_a_drawn_key_opens_by_its_line(tmp_path: Path) -> None:
    def run() -> tuple[str, str]:
        command = [sys.executable, "-m", "aiollm", "key", "alice"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.strip(), done.stdout

    (key, line), (other, _) = run(), run()
    assert key != other and key.startswith("sk-") and len(key) >= 3 + 43
    assert key not in line and sha256(key.encode()).hexdigest() in line
    keys = Keys((), read(tmp_path, line))
    found = keys.find(key.encode())
    assert found is not None and found.name == "alice"
    assert keys.find(other.encode()) is None and keys.find(b"") is None


def test_a_key_whose_line_cannot_be_written_is_none() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "aiollm", "key", "alice"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 1 and said.startswith("aiollm: ") and said.endswith("No space left on device")


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--name"], ["a b"], ["1"], ["x" * 65]])
def test_a_name_that_is_none_draws_nothing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "sk-" not in "".join(capsys.readouterr())


def test_its_help_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "aiollm key NAME" in capsys.readouterr().out
