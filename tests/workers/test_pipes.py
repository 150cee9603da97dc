import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from aiollm.wire.framing import FrameReader, FrameWriter
from aiollm.wire.messages import Fatal, FromWorker, Header, Loading, Result, Stop, Update, encoder, from_worker_decoder
from aiollm.workers.pipes import PipeInbox, PipeOutbox


def result(iteration: int) -> Result:
    return Result(header=Header(1, iteration, iteration, 0, 0, 0, b""))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    os.close(ends[0])
    os.close(ends[1])


def received(fd: int) -> list[FromWorker]:
    return [from_worker_decoder.decode(body) for body in FrameReader(fd).read()]


def test_an_inbox_waits_for_messages_and_for_their_end() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    inbox, writer = PipeInbox(FrameReader(read)), FrameWriter(write)
    writer.send(encoder.encode(Update(number=1)))
    writer.send(encoder.encode(Stop()))
    writer.flush()
    assert inbox.wait()
    assert list(inbox.drain()) == [Update(number=1), Stop()]
    assert list(inbox.drain()) == []
    os.close(write)
    assert inbox.wait()
    assert list(inbox.drain()) == []
    assert not inbox.wait()
    os.close(read)


def test_messages_leave_in_the_order_of_put_whichever_thread_flushes(pipe: tuple[int, int]) -> None:
    outbox, baton = PipeOutbox(FrameWriter(pipe[1])), threading.Lock()
    iterations = iter(range(1, 401))

    def work() -> None:
        for _ in range(100):
            with baton:
                outbox.put(result(next(iterations)))
                outbox.offer()
            outbox.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [message.header.iteration for message in received(pipe[0]) if isinstance(message, Result)]
    assert found == list(range(1, 401))


def test_an_offer_never_waits(pipe: tuple[int, int]) -> None:
    """Neither for the reader nor for the other thread, which waits for it."""
    outbox, filled = PipeOutbox(FrameWriter(pipe[1])), 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(pipe[1], bytes(4096))
    outbox.put(result(1))
    outbox.offer()
    flushing = threading.Thread(target=outbox.flush)
    flushing.start()
    outbox.put(result(2))
    outbox.offer()
    assert flushing.is_alive()
    while filled:
        filled -= len(os.read(pipe[0], filled))
    flushing.join()
    outbox.put(result(3))
    outbox.offer()
    assert received(pipe[0]) == [result(1), result(2), result(3)]


def test_a_rank_that_does_not_speak_still_says_how_it_loads_and_why_it_ends(pipe: tuple[int, int]) -> None:
    outbox = PipeOutbox(FrameWriter(pipe[1]), speaks=False)
    for message in (Loading("a", 0.0), result(1), Fatal("b")):
        outbox.put(message)
    outbox.flush()
    assert received(pipe[0]) == [Loading("a", 0.0), Fatal("b")]
