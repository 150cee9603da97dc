import json

import pytest
import report


def run(policy, goodput, seed=0, workload="w"):
    return {"workload": workload, "policy": policy, "goodput": goodput, "answers": 10 + seed}


def two(policy, *goodputs, workload="w"):
    return report.over_seeds([run(policy, goodput, seed, workload) for seed, goodput in enumerate(goodputs)])


def test_runs_of_several_seeds_become_one_with_its_spread():
    row = two("a", 90.0, 110.0)
    assert row["goodput"] == 100 and row["answers"] == 10.5 and row["policy"] == "a"
    assert row["goodput_by_seed"] == [90, 110] and row["goodput_sd"] == pytest.approx(14.14, abs=0.01)
    assert two("a", 90.0)["goodput_sd"] == 0


def test_policies_are_compared_seed_by_seed():
    rows = [two("past-future", 100.0, 300.0), two("conservative", 100.0, 100.0)]
    report.beside(rows)
    assert (rows[0]["by_conservative"], rows[0]["by_conservative_least"]) == (2.0, 1.0)
    assert "by_aggressive" not in rows[0]


def test_a_saved_file_takes_up_what_was_made_alike_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "plot", lambda *_: None)
    order = ("w", "v", "past-future", "conservative")
    for rows in ([two("conservative", 50.0)], [two("past-future", 80.0)], [two("past-future", 100.0)]):
        report.save("made", rows, {"pool": 7}, (), order)
    saved = json.loads((tmp_path / "made.json").read_bytes())
    assert saved["about"]["pool"] == 7
    assert [(row["policy"], row["by_conservative"]) for row in saved["runs"]] == [
        ("past-future", 2.0), ("conservative", 1.0),
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        report.save("made", [two("past-future", 1.0)], {"pool": 8}, (), order)


def test_a_table_has_a_line_for_each_run_and_blanks_for_what_it_lacks():
    lines = report.table([two("a", 1234.5)], ("workload", "policy", "goodput", "memory")).split("\n")
    assert len(lines) == 2 and "1,234" in lines[1] and lines[0].split() == ["workload", "policy", "goodput", "memory"]
