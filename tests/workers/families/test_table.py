import json
import subprocess
import sys

import models

from aiollm.workers.families.registry import FAMILIES
from aiollm.workers.families.table import rows


def test_every_architecture_is_in_the_table_once() -> None:
    found = rows()
    assert sorted(name for row in found for name in row.architectures) == sorted(FAMILIES)
    assert all(row.models and row.parts for row in found)


def test_the_readme_has_the_table_as_it_is() -> None:
    text = models.README.read_text(encoding="utf-8")
    assert text.count("ForCausalLM`") > 20
    assert models.written(text) == text, "run python tools/models.py"


def test_every_family_has_been_measured_and_is_within_the_limit() -> None:
    measured = json.loads(models.RESULTS.read_text(encoding="utf-8"))["families"]
    assert measured.keys() == {row.module for row in rows()}
    assert max(family["error"] for family in measured.values()) <= 1e-4


def test_the_command_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "aiollm", "models"], capture_output=True, text=True, check=True)
    assert "Gemma2ForCausalLM\n    Gemma 2: " in done.stdout
