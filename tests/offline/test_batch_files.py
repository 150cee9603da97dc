import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiollm.offline.batch_files import Answer, Answers, Asked, LineError, Response, asked

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt":  "x"}}'
ANSWERS = [
    Answer("batch_req_1", "a", Response(200, "1", {"choices": []}), None),
    Answer("batch_req_2", "b", Response(400, "2", {"error": {}}), None),
    Answer("batch_req_3", None, None, LineError("invalid_line", "line 7", 7)),
]


def test_a_request_keeps_its_body_byte_for_byte() -> None:
    found = asked(LINE, 1)
    assert isinstance(found, Asked)
    assert (found.custom_id, found.method, found.url) == ("a", "POST", "/v1/completions")
    assert bytes(found.body) == b'{"prompt":  "x"}'


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense", "invalid_json_line"),
        (b'{"custom_id": "a"', "invalid_json_line"),
        (b'{"custom_id": "\xff"}', "invalid_json_line"),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000, "invalid_json_line"),
        (b"[]", "invalid_line"),
        (b'{"custom_id": 5}', "invalid_line"),
        (b'{"url": "/v1/completions"}', "invalid_line"),
    ],
)
def test_a_line_that_is_no_request_is_told_by_its_number(line: bytes, code: str) -> None:
    found = asked(line, 12)
    assert isinstance(found, LineError)
    assert (found.code, found.line) == (code, 12) and found.message.startswith("line 12")


def written(path: Path) -> list[bytes]:
    answers = Answers(str(path))
    for answer in ANSWERS:
        answers.write(answer)
    answers.close()
    return path.read_bytes().splitlines(keepends=True)


def test_answers_that_are_there_are_known(tmp_path: Path) -> None:
    lines = written(tmp_path / "out")
    assert [json.loads(line)["custom_id"] for line in lines] == ["a", "b", None]
    answers = Answers(str(tmp_path / "out"))
    assert answers.done == ({"a", "b"}, {7}, 2, sum(map(len, lines)))
    answers.close()


def test_an_answer_that_was_cut_off_anywhere_is_none(tmp_path: Path) -> None:
    path = tmp_path / "out"
    *whole, last = written(path)
    kept = b"".join(whole)
    for end in range(len(last)):
        path.write_bytes(kept + last[:end])
        answers = Answers(str(path))
        assert (answers.done.ids, answers.done.lines) == ({"a", "b"}, set())
        answers.write(ANSWERS[2])
        answers.close()
        assert path.read_bytes() == kept + last


@pytest.mark.parametrize("text", [LINE + b"\n", LINE, b"{}\n", b"notes", b"\n"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="line 1 is no answer of a batch"):
        Answers(str(path))
    assert path.read_bytes() == text


def test_a_pipe_gets_answers_and_is_not_read() -> None:
    source, target = os.pipe()
    os.write(target, b"of somebody else\n")
    answers = Answers(f"/dev/fd/{target}")
    answers.write(ANSWERS[0])
    answers.close()
    assert answers.done == (set(), set(), 0, 0)
    first, second = os.read(source, 10_000).splitlines()
    assert first == b"of somebody else" and json.loads(second)["custom_id"] == "a"
    os.close(source)
    os.close(target)


def test_a_device_gets_answers_and_one_that_takes_none_is_named() -> None:
    answers = Answers("/dev/null")
    answers.write(ANSWERS[0])
    answers.close()
    answers = Answers("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        answers.write(ANSWERS[0])
    answers.close()


def test_standard_output_that_takes_no_answer_is_named() -> None:
    script = "from aiollm.offline.batch_files import *; Answers('-').write(Answer('', None, None, None))"
    command = [sys.executable, "-c", script]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("No space left on device: 'standard output'")


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = Answers(str(tmp_path / "out"))
    with pytest.raises(OSError, match="another run writes to it"):
        Answers(str(tmp_path / "out"))
    first.close()
    Answers(str(tmp_path / "out")).close()
