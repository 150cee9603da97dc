"""The operator's socket as a file: private, alone, and gone at the end."""

import os
from pathlib import Path

import pytest

from aiollm.listening import private_socket


def test_the_socket_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with private_socket(str(path)):
        assert os.stat(path).st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with private_socket(str(path)) as sock:
        with pytest.raises(OSError, match="a server listens there; see --admin_socket"), private_socket(str(path)):
            pass
        assert path.exists()
        sock.close()  # as if it was killed
        with private_socket(str(path)):
            pass
    path.write_text("mine")
    with pytest.raises(OSError, match="something else lies there"), private_socket(str(path)):
        pass
    assert path.read_text() == "mine"
    for wrong in (tmp_path / "no" / "folder", tmp_path / ("x" * 200)):
        with pytest.raises(OSError, match="cannot listen on"), private_socket(str(wrong)):
            pass


def test_a_socket_that_somebody_else_put_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with private_socket(str(path)):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"
