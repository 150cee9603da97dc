import os
import random
import threading
from collections.abc import Iterator

import pytest

from aiollm.wire.arena import Arena
from aiollm.wire.framing import INLINE_LIMIT, FrameReader, FrameWriter, enlarge

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """The non-blocking ends (read, write) of a pipe; a test may close them itself."""
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue


def encoded(*bodies: bytes) -> bytes:
    """The bytes of these frames on a pipe."""
    read, write = os.pipe()
    writer = FrameWriter(write)
    for body in bodies:
        writer.send(body)
    assert not writer.flush()
    os.close(write)
    with os.fdopen(read, "rb") as file:
        return file.read()


def test_frames_survive_every_cut(pipe: Pipe) -> None:
    bodies = [b"one", b"", b"three" * 5]
    data = encoded(*bodies)
    for cut in range(len(data) + 1):
        reader = FrameReader(pipe[0])
        os.write(pipe[1], data[:cut])
        found = list(reader.read())
        os.write(pipe[1], data[cut:])
        found += list(reader.read())
        assert found == bodies, f"cut at {cut}"
        assert list(reader.read()) == [] and not reader.closed


def test_a_full_pipe_keeps_the_rest_in_order(pipe: Pipe) -> None:
    r = random.Random(0)
    bodies = [r.randbytes(r.randint(0, 30_000)) for _ in range(60)]
    writer, reader = FrameWriter(pipe[1]), FrameReader(pipe[0])
    for body in bodies:
        writer.send(body)
    found: list[bytes | memoryview] = []
    while writer.flush():
        assert writer.pending
        for _ in range(r.randint(1, 3)):
            found += reader.read()
    while len(found) < len(bodies):
        found += reader.read()
    assert found == bodies
    assert writer.pending == 0


def test_a_blocking_flush_waits_for_the_reader(pipe: Pipe) -> None:
    body = random.Random(0).randbytes(1 << 20)
    writer, reader = FrameWriter(pipe[1]), FrameReader(pipe[0])
    writer.send(body)
    thread = threading.Thread(target=writer.flush_blocking)
    thread.start()
    found: list[bytes | memoryview] = []
    while not found:
        assert reader.wait(10)
        found += reader.read()
    thread.join()
    assert found == [body]


def test_reading_an_empty_pipe_does_not_block(pipe: Pipe) -> None:
    reader = FrameReader(pipe[0])
    assert list(reader.read()) == []
    assert not reader.wait(0)
    assert not reader.closed


def test_a_reader_that_stops_early_finds_the_other_frames_at_the_next_call(pipe: Pipe) -> None:
    reader = FrameReader(pipe[0])
    os.write(pipe[1], encoded(b"setup", b"update", b"stop"))
    assert next(reader.read()) == b"setup"
    assert list(reader.read()) == [b"update", b"stop"]


def test_one_read_takes_a_bounded_amount(pipe: Pipe) -> None:
    """Whoever reads on an event loop gets other work done between two reads, however fast the writer is."""
    enlarge(pipe[1])
    writer, reader = FrameWriter(pipe[1]), FrameReader(pipe[0])
    frames = reader.read()
    for _ in range(3):
        writer.send(bytes(1000))
        writer.flush()
    assert len(list(frames)) == 3
    writer.send(b"first")
    writer.flush()
    frames = reader.read()
    assert next(frames) == b"first"
    writer.send(b"second")
    writer.flush()
    assert list(frames) == []
    assert list(reader.read()) == [b"second"]


def test_the_end_of_the_stream_is_seen_after_the_last_frame(pipe: Pipe) -> None:
    reader = FrameReader(pipe[0])
    os.write(pipe[1], encoded(b"last") + b"\x05")
    os.close(pipe[1])
    assert list(reader.read()) == [b"last"]
    assert not reader.closed
    assert reader.wait(10)
    assert list(reader.read()) == []
    assert reader.closed


def test_a_reader_that_is_gone_breaks_the_pipe(pipe: Pipe) -> None:
    writer = FrameWriter(pipe[1])
    os.close(pipe[0])
    writer.send(b"lost")
    with pytest.raises(BrokenPipeError):
        writer.flush()
    with pytest.raises(BrokenPipeError):
        writer.flush_blocking()


def test_large_numbered_bodies_go_through_the_arena_and_keep_their_place(pipe: Pipe) -> None:
    arena = Arena.create(1 << 16)
    writer, reader = FrameWriter(pipe[1], arena), FrameReader(pipe[0], arena)
    bodies = [b"a" * INLINE_LIMIT, b"b" * (INLINE_LIMIT + 1), b"c", b"d" * (INLINE_LIMIT + 2)]
    for number, body in enumerate(bodies, 1):
        writer.send(body, number if number < 4 else 0)
    assert not writer.flush()
    assert arena.used == 1, "small bodies and those without a number stay in the pipe"
    found = list(reader.read())
    assert found == bodies
    assert [type(body) for body in found] == [bytes, memoryview, bytes, bytes]
    del found
    arena.close()


def test_a_full_arena_holds_everything_behind_it_until_space_is_freed(pipe: Pipe) -> None:
    arena = Arena.create(20_000)
    writer, reader = FrameWriter(pipe[1], arena), FrameReader(pipe[0], arena)
    for number, body in enumerate([bytes(15_000), bytes(15_001), b"small"], 1):
        writer.send(body, number)
    assert not writer.flush(), "waiting for the pipe would not help"
    assert writer.pending == 2
    assert [len(body) for body in reader.read()] == [15_000]
    arena.free(1)
    assert not writer.flush()
    assert writer.pending == 0
    assert [len(body) for body in reader.read()] == [15_001, 5]
    arena.close()


def test_a_body_larger_than_the_arena_goes_through_the_pipe(pipe: Pipe) -> None:
    arena = Arena.create(10_000)
    writer, reader = FrameWriter(pipe[1], arena), FrameReader(pipe[0], arena)
    writer.send(bytes(10_001), 1)
    assert not writer.flush()
    assert list(reader.read()) == [bytes(10_001)]
    arena.close()


def test_a_frame_into_a_missing_arena_is_refused(pipe: Pipe) -> None:
    arena = Arena.create(1 << 16)
    writer = FrameWriter(pipe[1], arena)
    writer.send(bytes(INLINE_LIMIT + 1), 1)
    writer.flush()
    with pytest.raises(ValueError, match="an arena that this reader does not have"):
        list(FrameReader(pipe[0]).read())
    arena.close()
