"""What the README shows of Python is run, with a tiny model in place of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tree import ROOT

MARK = "<!-- python: run by tests/offline/test_readme.py -->"
MODEL = "Qwen/Qwen3-0.6B"


def test_the_examples_run(folder: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(MARK)[2].partition("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    printed = []
    environ = os.environ | {"AIOLLM_THREADS": "1", "AIOLLM_MAX_TOTAL_TOKEN_NUM": "5000"}
    for shown in (first, second):
        assert MODEL in shown
        source = shown.replace(MODEL, str(folder)).replace("max_model_len=4096", "max_model_len=2048")
        command = [sys.executable, "-W", "error", "-c", source]
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)
        assert done.returncode == 0 and done.stderr == ""
        printed.append(done.stdout)
    assert printed[0].startswith("The sky is") and "\nGrass is" in printed[0]
    assert re.search(r"\n[1-9]\d? ", printed[0]), "tokens of a stream, which may end before its 50"
    assert printed[1]
