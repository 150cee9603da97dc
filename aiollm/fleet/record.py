"""Keeps the message stream of rank 0 in a file, for `python -m aiollm.workers --replay FILE`.

Prompts and outputs are in it, as token ids.
"""

import struct
from typing import BinaryIO

_HEAD = struct.Struct("<BI")  # direction, length of the body
TO_WORKER, FROM_WORKER = 0, 1


class Recorder:
    """Appends messages as they pass. Raises OSError where the file cannot be written."""

    def __init__(self, path: str) -> None:
        self._file: BinaryIO = open(path, "wb")

    def keep(self, direction: int, body: bytes | memoryview) -> None:
        self._file.write(_HEAD.pack(direction, len(body)))
        self._file.write(body)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
