"""Runs what the tests say of a GPU, and keeps the outcome: how many passed, in which versions, and what they measured.

    python tools/gpu_tests.py [--save FILE] [-- ARGUMENTS OF PYTEST]

Kernels are held natively against their references where there is a GPU, so all of tests/kernels runs; of other tests
those marked `gpu`. Files without that mark are not even imported: the machine need not have what they are about.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench_gpu import divided, machine

ROOT = Path(__file__).parent.parent
QUICK = "not timing and not long"


def marked() -> list[str]:
    """The files with tests marked `gpu` beside those of the kernels."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    found = (file.relative_to(ROOT) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8"))
    return [str(file) for file in found if "kernels" not in file.parts]


def groups() -> dict[str, list[str]]:
    """What pytest is told, by the group's name."""
    return {"kernels": ["tests/kernels", "-m", QUICK], "others": [*marked(), "-m", f"gpu and {QUICK}"]}


def outcome(report: Path) -> dict[str, Any]:
    """Of pytest's report in JUnit's format: numbers, names of failures, and the properties that tests recorded."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": len(skipped),
        "recorded": {
            f"{case.get('name')}: {each.get('name')}": each.get("value")
            for case in cases
            for each in case.iter("property")
        },
    }


def commit() -> str:
    """The commit of the tree, with a plus where files differ from it; empty where there is no git."""
    asked = [["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    try:
        found = [subprocess.run(each, cwd=ROOT, capture_output=True, text=True, check=True).stdout for each in asked]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found[0].strip() + ("+" if found[1] else "")


def main() -> int:
    argv, more = divided(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the outcome as JSON")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"machine": machine(), "commit": commit()}
    for name, chosen in groups().items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--strict-markers", "--import-mode=importlib"]
            subprocess.run([*command, "-q", f"--junitxml={report}", *chosen, *more], cwd=ROOT, check=False)
            found[name] = outcome(report)
        print(name, json.dumps(found[name], indent=1), flush=True)
        if args.save:
            args.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if any(found[name]["failed"] for name in groups()) else 0


if __name__ == "__main__":
    sys.exit(main())
