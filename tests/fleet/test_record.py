from pathlib import Path

import pytest

from aiollm.fleet.record import FROM_WORKER, TO_WORKER, Recorder
from aiollm.workers import replay


def test_a_record_is_read_as_it_was_kept(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path / "record"))
    recorder.keep(TO_WORKER, b"one")
    recorder.keep(FROM_WORKER, memoryview(b"two" * 5000))
    recorder.keep(TO_WORKER, b"")
    assert list(replay.read(tmp_path / "record")) == [(0, b"one"), (1, b"two" * 5000), (0, b"")], "before it is closed"
    recorder.close()
    assert (TO_WORKER, FROM_WORKER) == (replay.TO_WORKER, replay.FROM_WORKER)


@pytest.mark.parametrize("cut", [1, 4, 6, 8])
def test_a_message_that_was_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "record"
    recorder = Recorder(str(path))
    recorder.keep(TO_WORKER, b"whole")
    recorder.keep(TO_WORKER, b"part")
    recorder.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(replay.read(path)) == [(0, b"whole")]


def test_a_full_disk_ends_the_record_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder("/dev/full")
    for _ in range(3):
        recorder.keep(TO_WORKER, b"lost")
    assert len(caplog.messages) == 1
    assert "the record ends here" in caplog.messages[0] and "No space left" in caplog.messages[0]
    recorder.close()


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recorder(str(tmp_path / "missing" / "record"))
