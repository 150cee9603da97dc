"""Keeps the message stream of rank 0 in a file, for `python -m aiollm.workers --replay FILE`.

Prompts and outputs are in it, as token ids.
"""

import logging
import struct
from pathlib import Path

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<BI")  # direction, length of the body
TO_WORKER, FROM_WORKER = 0, 1


class Recorder:
    """Appends messages as they pass, unbuffered. Raises OSError where the file cannot be opened."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115  open as long as the server serves

    def keep(self, direction: int, body: bytes | memoryview) -> None:
        """Append a message. On a full disk the record ends, and the server goes on."""
        if self._file.closed:
            return
        try:
            self._file.write(_HEAD.pack(direction, len(body)) + body)
        except OSError as error:
            log.error("the record ends here: %s", error)
            self._file.close()

    def close(self) -> None:
        self._file.close()
