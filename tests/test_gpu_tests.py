"""What is kept of a run of the tests on a GPU."""

import subprocess
import sys
from pathlib import Path

import gpu_tests

TESTS = """
import pytest

def test_fine(record_property):
    record_property("swapped", "3 of 40")

def test_wrong():
    assert False

@pytest.fixture
def broken():
    raise ValueError

def test_without_what_it_needs(broken):
    pass

@pytest.mark.skip
def test_elsewhere():
    pass
"""


def test_failures_are_named_and_what_was_recorded_is_kept(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml", "-p", "no:cacheprovider", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, check=False, stdout=subprocess.DEVNULL)
    assert gpu_tests.outcome(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": ["test_some::test_wrong", "test_some::test_without_what_it_needs"],
        "skipped": 1,
        "recorded": {"test_fine: swapped": "3 of 40"},
    }


def test_only_files_with_such_tests_are_imported() -> None:
    files = gpu_tests.groups()["others"]
    assert "tests/test_serve_gpu.py" in files and "tests/workers/test_gpu.py" in files
    assert not any(file.startswith(("tests/kernels", "tests/api")) for file in files)
