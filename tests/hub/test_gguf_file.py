"""The GGUF reader agrees with the one of the gguf package, and says what is wrong with a damaged file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from aiollm.hub.errors import HubError
from aiollm.hub.gguf_file import GgufFile


def test_fields_and_tensors_equal_those_of_the_gguf_package(tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, fields={"test.bool": True, "test.floats": [0.5, 2.0]})
    reference = gguf.GGUFReader(path)
    with GgufFile(path) as ours:
        expected = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
        assert ours.fields == expected
        assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            mine = ours.tensors[tensor.name]
            assert (mine.type, mine.shape) == (tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))
            raw = ours.read_rows(mine, 0, mine.rows)
            assert np.array_equal(raw.ravel(), tensor.data.ravel().view(np.uint8))
            assert np.array_equal(ours.read_rows(mine, mine.rows - 1, 1)[0], raw[-1])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    sizes = np.random.default_rng(3).integers(0, len(whole), 200).tolist()
    for size in [0, 3, 23, 24, 40, len(whole) - 1, *sizes]:
        cut.write_bytes(whole[:size])
        with pytest.raises(HubError, match=r"truncated|not a GGUF file"):
            GgufFile(cut)


def test_a_file_with_flipped_header_bytes_raises_nothing_but_a_hub_error(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    random = np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(random.integers(0, 9000))] ^= int(random.integers(1, 256))
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            GgufFile(tmp_path / "damaged.gguf").__exit__(None, None, None)
        except HubError:
            refused += 1
    assert refused > 20


def test_old_versions_are_named(tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "old.gguf"
    write_gguf(path)
    path.write_bytes(b"GGUF\x01\x00\x00\x00" + path.read_bytes()[8:])
    with pytest.raises(HubError, match="version 1 is not supported"):
        GgufFile(path)
