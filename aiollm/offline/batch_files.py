"""The two files of a batch, in OpenAI's form: requests, a line each, and answers, which grow line by line.

What the answers hold already is not asked again. A line that was being written when a run was killed is cut off.
A pipe or a device, as standard output, gets answers and is not asked what it holds.
"""

import fcntl
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

STANDARD = "-"
HEAD = b'{"id":"batch_req_'  # how every answer begins


class Asked(msgspec.Struct, frozen=True):
    """A line of requests. What it lacks but its id, the server misses."""

    custom_id: str
    method: str = "POST"
    url: str = ""
    body: msgspec.Raw = msgspec.Raw(b"")


class Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: Any


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with line `line` of the requests, from 1."""

    code: str
    message: str
    line: int
    param: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """A line of answers: to a request, or to a line that is none. `id` is `batch_req_` and what makes it unique."""

    id: str
    custom_id: str | None
    response: Response | None
    error: LineError | None


class _Told(msgspec.Struct, frozen=True):
    """What an earlier run's answer tells us."""

    class Status(msgspec.Struct, frozen=True):
        status_code: int

    class Line(msgspec.Struct, frozen=True):
        line: int = 0

    id: str
    custom_id: str | None
    response: Status | None
    error: Line | None = None


class Done(NamedTuple):
    """What was answered before. A million ids are some 100 MB."""

    ids: set[str]
    lines: set[int]
    """Numbers of lines that are no requests."""
    failed: int
    end: int
    """Bytes of whole lines."""


_ASKED = msgspec.json.Decoder(Asked)
_TOLD = msgspec.json.Decoder(_Told)
_encoder = msgspec.json.Encoder()


def asked(line: bytes, number: int) -> Asked | LineError:
    """The request of a line."""
    try:
        line.decode()  # msgspec does not look into the strings of fields that it skips
        found = _ASKED.decode(line)
    except msgspec.ValidationError as error:
        return LineError("invalid_line", f"line {number}: {error}", number)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError among them
        return LineError("invalid_json_line", f"line {number} is not valid JSON: {error}", number)
    return found


class Answers:
    """The file of answers, open for more. One run at a time has it."""

    def __init__(self, path: str) -> None:
        """Raises OSError where it cannot be opened or another run writes to it, ValueError where it is none of ours."""
        self._name = "standard output" if path == STANDARD else path
        self.done = Done(set(), set(), 0, 0)
        if path == STANDARD:
            self._fd = os.dup(1)
            return
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                return
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{path}: another run writes to it") from None
            self.done = _done(path)
            os.truncate(self._fd, self.done.end)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, answer: Answer) -> None:
        """Append a line, whole, to the file itself. Raises OSError, which names it, where there is no room."""
        left = memoryview(_encoder.encode(answer) + b"\n")
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from error

    def close(self) -> None:
        os.close(self._fd)


def _done(path: str) -> Done:
    """What a file of answers holds. A last line without an end is none; ValueError where another is no answer."""
    ids: set[str] = set()
    lines: set[int] = set()
    failed = end = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line.startswith(HEAD) or HEAD.startswith(line)):
                break
            try:
                told = _TOLD.decode(line)
            except ValueError:
                raise ValueError(f"{path}: line {number} is no answer of a batch; give another file for OUT") from None
            failed += told.response is None or told.response.status_code != 200
            if told.error is not None:
                lines.add(told.error.line)
            elif told.custom_id is not None:
                ids.add(told.custom_id)
            end += len(line)
    return Done(ids, lines, failed, end)
