"""The wheel holds workers and kernels inside aiollm, and what is in it runs from any directory."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aiollm import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its build folder in the source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("aiollm", "workers", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_every_module_is_in_the_wheel_and_nothing_lies_beside_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("aiollm", "aiollm"), ("workers", "aiollm/workers"), ("kernels", "aiollm/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "aiollm/api/page").iterdir():
        assert f"aiollm/api/page/{path.name}" in names
    for path in (ROOT / "kernels/tuned").glob("*/*.json"):
        assert f"aiollm/kernels/{path.relative_to(ROOT / 'kernels')}" in names
    assert "aiollm/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"aiollm", f"aiollm-{__version__}.dist-info"}


def test_the_wheel_says_what_it_needs_and_under_which_licence_it_stands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"aiollm-{__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert any("LICENSE" in name for name in archive.namelist())
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    required = {line.split(";")[0] for line in metadata.get_all("Requires-Dist", [])}
    assert any(line.startswith("torch") for line in required)


def test_what_was_unpacked_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    code = "import aiollm.workers, aiollm.kernels; print(aiollm.workers.__file__, aiollm.kernels.__file__)"
    for command, expected in ((["-m", "aiollm", "--version"], f"aiollm {__version__}"), (["-c", code], str(site))):
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": str(site)},
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_every_requirement_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    wanted = [Requirement(line) for text in lists for line in text.splitlines() if line and not line.startswith("#")]
    assert wanted
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the tested {version}"
