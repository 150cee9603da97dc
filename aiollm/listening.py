"""The sockets that the server listens on."""

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; OSError names the flag that helps."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; see --host and --port") from error


def is_private(sock: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return sock.family == socket.AF_UNIX or ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def address(sock: socket.socket, scheme: str = "http") -> str:
    """The address that reaches this server from here."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextlib.contextmanager
def private_socket(path: str) -> Iterator[socket.socket]:
    """A Unix socket at `path` that this user alone can open, removed at the end. One that a server left behind when it
    was killed is replaced.

    Raises OSError where a server listens there, where something else lies there, or where it cannot be made.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _make_room(path)
            sock.bind(path)
            os.chmod(path, 0o600)  # nobody could connect so far
            sock.listen()
        except OSError as error:
            raise OSError(f"cannot listen on {path}: {error.strerror or error}; see --admin_socket") from error
        own = os.lstat(path).st_ino
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_ino == own:
                    os.unlink(path)


def _make_room(path: str) -> None:
    """Remove a socket on which nobody listens."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError("something else lies there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
        except BlockingIOError as error:
            raise OSError("a server listens there") from error
        else:
            raise OSError("a server listens there")
