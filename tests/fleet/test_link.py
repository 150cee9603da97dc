"""A link to processes that are no workers: what the event loop sees of odd ends."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crew import until

from aiollm.fleet.link import Link
from aiollm.wire.messages import Fatal, FromWorker, Update, encoder

POPEN = subprocess.Popen
OUTBOX = "int(sys.argv[sys.argv.index('--outbox') + 1])"
INBOX = "int(sys.argv[sys.argv.index('--inbox') + 1])"


class Ear:
    """What a link said."""

    def __init__(self) -> None:
        self.messages: list[FromWorker] = []
        self.statuses: list[int] = []

    def link(self) -> Link:
        return Link(None, [], [], self._hear, lambda link, status: self.statuses.append(status))

    def _hear(self, body: bytes | memoryview, message: FromWorker) -> None:
        self.messages.append(message)


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run a piece of Python where a worker would be started."""

    def use(code: str) -> None:
        def popen(command: list[str], **others: Any) -> Any:
            arguments = command[command.index("aiollm.workers") + 1 :]
            return POPEN([sys.executable, "-S", "-c", f"import os, sys, time\n{code}", *arguments], **others)

        monkeypatch.setattr("aiollm.fleet.link.subprocess.Popen", popen)

    return use


def test_a_process_that_is_slow_to_end_does_not_block_the_loop(
    instead: Callable[[str], None],
) -> None:
    """As a GPU's driver does it: descriptors go one by one, and those of the device take their time."""
    instead(f"os.close({OUTBOX}); time.sleep(1); sys.exit(7)")

    async def watch() -> float:
        ear, longest, last = Ear(), 0.0, time.monotonic()
        link = ear.link()
        while not ear.statuses:
            await asyncio.sleep(0.002)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert (ear.statuses, link.closed) == ([7], True)
        return longest

    assert asyncio.run(watch()) < 0.6


def test_the_last_word_comes_before_the_exit_status(instead: Callable[[str], None]) -> None:
    body = encoder.encode(Fatal("why"))
    frame = len(body).to_bytes(4, "little") + bytes(4) + body
    instead(f"os.write({OUTBOX}, {frame!r}); os._exit(3)")

    async def listen() -> None:
        ear = Ear()
        ear.link()
        await until(lambda: ear.statuses)
        assert (ear.messages, ear.statuses) == ([Fatal("why")], [3])

    asyncio.run(listen())


def test_a_full_arena_does_not_keep_the_loop_busy(
    instead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody frees it, so there is nothing to do; the process must not be asked again and again."""
    monkeypatch.setattr("aiollm.fleet.link.ARENA_SIZE", 20_000)
    instead("time.sleep(60)")

    async def wait() -> float:
        ear = Ear()
        link = ear.link()
        for number in (1, 2):
            link.send(encoder.encode(Update(number=number, retire=bytes(15_000))), number)
        began = time.process_time()
        await asyncio.sleep(0.3)
        busy = time.process_time() - began
        assert link._writer.pending == 1
        link.applied(1)
        assert link._writer.pending == 0
        link.kill()
        await until(lambda: ear.statuses)
        return busy

    assert asyncio.run(wait()) < 0.15


def test_what_a_full_pipe_holds_back_follows_when_it_is_read(instead: Callable[[str], None]) -> None:
    instead(
        f"count = 0\nos.set_blocking({INBOX}, True)\n"
        f"while count < 3_000_000: count += len(os.read({INBOX}, 1 << 20))\n"
        "sys.exit(count % 251)"
    )

    async def send() -> None:
        ear = Ear()
        link = ear.link()
        for _ in range(300):
            link.send(bytes(10_000 - 8))
        assert link._writer.pending
        await until(lambda: ear.statuses)
        assert ear.statuses == [3_000_000 % 251]
        link.send(b"to nobody")
        link.applied(1)

    asyncio.run(send())


def test_modules_of_the_current_folder_do_not_reach_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import os\nos._exit(42)\n")
    monkeypatch.chdir(tmp_path)

    async def leave() -> None:
        ear = Ear()
        link = ear.link()
        link.send(encoder.encode(Update(number=1)))
        await until(lambda: ear.statuses)
        assert ear.messages == [Fatal("the first message is Update, not Setup")]
        assert ear.statuses == [1]

    asyncio.run(leave())
