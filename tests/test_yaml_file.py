"""YAML files of settings."""

from pathlib import Path

import pytest

from aiollm.yaml_file import dump, load, located

VALUES = {"text": "yes", "empty": "", "list": [1, 2], "nothing": [], "number": 0.5, "flag": True, "odd": "é: - 'x'\n"}


def test_what_is_dumped_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(dump(VALUES), encoding="utf-8")
    assert load(str(path)) == VALUES
    assert list(load(str(path))) == list(VALUES)


@pytest.mark.parametrize("text", ["", "---\n", "# nothing", "{}", "null"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert load(str(tmp_path / "file")) == {}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a: 1\na: 2", "line 2: a stands there twice, first in line 1"),
        (b"a: {}\nb:\n  c: 1\n  c: 2", "line 4: c stands there twice, first in line 3"),
        (b"[a]", "must be a mapping"),
        (b"word", "must be a mapping"),
        (b"a: [1", "line 1"),
        (b"? [a]\n: 1", "unhashable"),
        (b"a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        (b"a: \xff", "utf-8"),
    ],
)
def test_what_is_no_mapping_of_names_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        load(str(tmp_path / "file"))


def test_names_are_what_is_written_and_their_lines_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("# keys\nyes:\n  on: 1\n\n  two: [x]\n007: {}\n1.10: 2\n")
    values, lines = located(str(tmp_path / "file"))
    assert values == {"yes": {True: 1, "two": ["x"]}, "007": {}, "1.10": 2}
    assert lines == {("yes",): 2, ("yes", "on"): 3, ("yes", "two"): 5, ("007",): 6, ("1.10",): 7}
