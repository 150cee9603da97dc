"""Damaged checkpoints are refused with the name of the file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aiollm.workers.checkpoint import MAX_HEADER, CheckpointError, stored

FILE = "model.safetensors"


def written(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def vector(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def split(folder: Path, **places: str) -> Path:
    """Two files with `a` and `b` in them, and an index that says `places`."""
    save_file({"a": torch.ones(4)}, folder / "one.safetensors")
    save_file({"b": torch.ones(6)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_tells_where_each_tensor_lies(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.full((1,), 7.0).half()}, tmp_path / FILE)
    found = stored(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "a": ("F32", (2, 3)), "b": ("F16", (1,)),
    }  # fmt: skip
    raw = (tmp_path / FILE).read_bytes()
    assert torch.frombuffer(bytearray(raw[found["a"].offset :][:24]), dtype=torch.float32).tolist() == [*range(6)]


def test_the_files_of_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    found = stored(split(tmp_path, a="one.safetensors", b="two.safetensors"))
    assert {name: tensor.path.name for name, tensor in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_files_of_any_name_serve_where_there_is_no_index(tmp_path: Path) -> None:
    split(tmp_path, a="one.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert stored(tmp_path).keys() == {"a", "b"}


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:20]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is damaged"),
    "a pointer": (lambda path: path.write_bytes(b"version https://git-lfs"), "is no safetensors file"),
    "a header over 100 MB": (
        lambda path: path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{"), f"limit of {MAX_HEADER}"
    ),
    "a header that is no JSON": (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "is damaged"),
    "a header that is no object": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "is damaged"),
    "overlapping tensors": (
        lambda path: written(path, {"a": vector(0, 16), "b": vector(8, 24)}, bytes(24)), "is damaged"
    ),
    "a gap": (lambda path: written(path, {"a": vector(0, 16), "b": vector(20, 24)}, bytes(24)), "is damaged"),
    "numbers that do not fill the shape": (
        lambda path: written(path, {"a": vector(0, 16) | {"shape": [5]}}, bytes(16)), "is damaged"
    ),
    "offsets that run backwards": (
        lambda path: written(path, {"a": vector(0, 16) | {"data_offsets": [16, 0]}}, bytes(16)), "is damaged"
    ),
    "a negative size": (lambda path: written(path, {"a": vector(0, 16) | {"shape": [-4]}}, bytes(16)), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, damage: str) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / FILE)
    spoil, words = DAMAGES[damage]
    spoil(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path / FILE))} .*{words}"):
        stored(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        stored(tmp_path)


def test_an_index_that_names_missing_files_is_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no four\.safetensors, three\.safetensors"):
        stored(split(tmp_path, a="one.safetensors", b="three.safetensors", c="four.safetensors"))


def test_a_file_that_lacks_what_the_index_promises_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"two\.safetensors has no a, which the index"):
        stored(split(tmp_path, a="two.safetensors", b="one.safetensors"))


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    split(tmp_path, a="one.safetensors", b="two.safetensors")
    save_file({"a": torch.ones(4), "b": torch.ones(6)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors and two\.safetensors both hold a"):
        stored(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="outside its folder"):
        stored(split(tmp_path, a="../other.safetensors"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_that_is_damaged_is_named(tmp_path: Path, text: str) -> None:
    split(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
        stored(tmp_path)
