"""systemd's side of a service: tell it of start, life and end, and take the socket that it listens on.

The protocol is a datagram of NAME=value lines to the socket in NOTIFY_SOCKET (sd_notify(3)), and descriptors from 3 on
(sd_listen_fds(3)). Without systemd every call does nothing. The variables are taken out of the environment, so that no
child speaks in our name.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

log = logging.getLogger(__name__)

FIRST_FD = 3
PROGRESS_SECONDS = 600  # loading may stay without a sign of progress for so long
STATUS_SECONDS = 1.0  # between two reports of one phase
SEND_SECONDS = 0.2  # for a message where systemd has ten unread ones; then it is lost


class Notifier:
    """What systemd is told. Safe to call from any thread."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        period = int(environ.pop("WATCHDOG_USEC", "0")) / 1e6
        pid = environ.pop("WATCHDOG_PID", "")
        self.watchdog = period if pid in ("", str(os.getpid())) else 0.0
        """Seconds within which systemd wants a sign of life; 0: it does not watch."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._phase = ""
        self._reported = 0.0

    def loading(self, phase: str, fraction: float | None) -> None:
        """Loading goes on; systemd waits for it that much longer."""
        now = time.monotonic()
        if phase != self._phase or now - self._reported >= STATUS_SECONDS:
            self._phase, self._reported = phase, now
            percent = f" {fraction:.0%}" if fraction is not None else ""
            self._send(f"STATUS={phase}{percent}", f"EXTEND_TIMEOUT_USEC={PROGRESS_SECONDS * 1_000_000}")

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def stopping(self, seconds: float, status: str) -> None:
        """The end may take `seconds`."""
        self._send("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    async def watch(self, progress: Callable[[], int | None]) -> None:
        """Give signs of life until cancelled, and none while work stands still.

        `progress` counts what was done, or is None while there is nothing to do. Two looks that find work and the same
        count mean that it stands still; they are half of systemd's time apart.
        """
        before = None
        while self.watchdog:
            now = progress()
            if now is None or now != before:
                self._send("WATCHDOG=1")
            before = now
            await asyncio.sleep(self.watchdog / 2)

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        text = "\n".join(line.replace("\n", " ") for line in lines)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.settimeout(SEND_SECONDS)
                out.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("systemd could not be told of %r: %s", text, error)


def inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd opened for us, if it did. Raises OSError where it passes something else."""
    pid, count = environ.pop("LISTEN_PID", ""), int(environ.pop("LISTEN_FDS", "0"))
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return None
    found = socket.socket(fileno=FIRST_FD)
    found.set_inheritable(False)
    if count > 1 or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(f"systemd passes {count} descriptors; one socket that listens for streams is expected")
    return found
