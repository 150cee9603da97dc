"""The table of fault cases is complete, and what it names is there."""

import ast

from fault_cases import CASES
from tree import ROOT

WANTED = [f"F{number}" for number in range(15, 81)] + [f"S{number}" for number in range(1, 13)]


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_case_is_tested_or_says_what_it_waits_for() -> None:
    assert list(CASES) == WANTED
    assert [name for name, case in CASES.items() if not (case.tests or case.waits)] == []


def test_every_test_that_a_case_names_exists() -> None:
    named = {test for case in CASES.values() for test in case.tests}
    known = {path: functions_of(path) for path in {test.partition("::")[0] for test in named}}
    assert sorted(test for test in named if test.partition("::")[2] not in known[test.partition("::")[0]]) == []
