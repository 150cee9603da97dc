"""WebSocket frames that no library would send, at a real server: closed with the right code, or read, at once."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from calm import seconds_of_health
from serving import Server

TEXT, CONTINUED, CLOSE, PING = 1, 0, 8, 9
COMPRESSED = 0x40
GREETING = (
    b"GET /v1/chat/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
SECONDS = 30


def frame(kind: int, data: bytes = b"", last: bool = True, masked: bool = True, flags: int = 0) -> bytes:
    mask, size = (0x80 if masked else 0), len(data)
    head = bytes([(0x80 if last else 0) | flags | kind])
    if size < 126:
        head += bytes([mask | size])
    elif size < 1 << 16:
        head += bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + size.to_bytes(8, "big")
    return head + (bytes(4) if masked else b"") + data


GOODBYE = frame(CLOSE, (1000).to_bytes(2, "big"))


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """Just after the upgrade."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), SECONDS) as client:
        client.sendall(GREETING)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        assert head.startswith(b"HTTP/1.1 101 ") and b"Sec-WebSocket-Extensions" not in head
        yield client


def rest(client: socket.socket) -> list[tuple[int, bytes]]:
    """Kind and content of every frame until the server closes; a reset ends it too."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            data += part
    frames = []
    while len(data) >= 2:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        frames.append((data[0] & 15, data[start : start + size]))
        data = data[start + size :]
    return frames


CASES: dict[str, tuple[list[bytes], int]] = {
    "a continuation of nothing": ([frame(CONTINUED, b"x")], 1002),
    "a message within a message": ([frame(TEXT, b"{", last=False), frame(TEXT, b"}")], 1002),
    "compressed, which was not agreed on": ([frame(TEXT, b"x", flags=COMPRESSED)], 1002),
    "another reserved bit": ([frame(TEXT, b"x", flags=0x20)], 1002),
    "an unknown kind": ([frame(3, b"x")], 1002),
    "a ping in pieces": ([frame(PING, b"x", last=False)], 1002),
    "a ping of 200 bytes": ([frame(PING, b"x" * 200)], 1002),
    "half a closing code": ([frame(CLOSE, b"\0")], 1002),
    "no closing code": ([frame(CLOSE, (1).to_bytes(2, "big"))], 1002),
    "an empty text": ([frame(TEXT)], 1007),
    "pieces without end": ([frame(TEXT, b"{", False), *[frame(CONTINUED, bytes(1 << 16), False)] * 80], 1009),
}


@pytest.mark.parametrize("name", CASES)
def test_what_breaks_the_protocol_ends_the_socket_with_its_code(server: Server, name: str) -> None:
    sent, code = CASES[name]
    with connected(server) as client:
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            for data in sent:
                client.sendall(data)
        kind, content = rest(client)[-1]
    assert (kind, int.from_bytes(content[:2], "big")) == (CLOSE, code)


def test_pieces_and_pings_between_them_make_one_message(server: Server) -> None:
    pieces = [frame(TEXT, b'{"ty', last=False), frame(PING, b"!"), *[frame(CONTINUED, last=False)] * 100_000]
    with connected(server) as client:
        client.sendall(b"".join([*pieces, frame(CONTINUED, b'pe":"ping"}'), GOODBYE]))
        answers = rest(client)
    assert [kind for kind, _ in answers] == [TEXT, 10, TEXT, CLOSE]
    assert answers[2][1] == b'{"type":"pong"}'


def test_a_flood_of_pings_is_answered_and_delays_nobody(server: Server) -> None:
    pings = 20_000
    with connected(server) as client:
        client.settimeout(SECONDS)
        answered = b""
        for _ in range(pings // 1000):
            client.sendall(frame(PING, b"x") * 1000)
            assert seconds_of_health(server) < 5
            answered += client.recv(1 << 20)
        client.sendall(GOODBYE)
        while part := client.recv(1 << 20):
            answered += part
    assert answered.count(b"\x8a\x01x") == pings


def test_two_hundred_sockets_may_open_and_be_cut_off_at_once(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(server))
        assert seconds_of_health(server) < 5
