"""tools/card.py with a stand-in for nvidia-smi."""

from pathlib import Path

import pytest
from card import Card, summed

LINES = """1980, 402.50, 51, 0x0000000000000000
1500, 699.10, 64, 0x0000000000000004
345, 180.00, 88, 0x0000000000000048
"""


def test_a_card_that_heat_slows_down_is_told_from_one_at_its_power_limit() -> None:
    assert summed(LINES) == {"sm_mhz": 1500, "watts": 402.5, "highest_celsius": 88, "slowed_share": 0.333}


def test_a_torn_line_and_a_card_that_tells_nothing_do_not_count() -> None:
    assert summed(LINES + "1980, 40") == summed(LINES)
    assert summed("No devices were found\n") == {} == summed("")


def test_it_watches_while_the_work_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi, seen = tmp_path / "nvidia-smi", tmp_path / "seen"
    smi.write_text(f"#!/bin/sh\nprintf '%s' '{LINES}'\n: > {seen}\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with Card() as card:
        while not seen.exists():
            pass
    assert card.summary() == summed(LINES)


def test_without_nvidia_smi_there_is_no_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Card() as card:
        pass
    assert card.summary() == {}
