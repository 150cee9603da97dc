"""A pickled checkpoint becomes safetensors with the same numbers; one that holds code is refused, and does not run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_tiny_model

from aiollm.workers.convert import ConvertError, convert

SHARED = torch.arange(12.0).reshape(3, 4)


class Evil:
    """What a pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_every_tensor_comes_out_as_it_was(tmp_path: Path) -> None:
    state = {
        "whole": SHARED, "again": SHARED, "rows": SHARED[1:], "turned": SHARED.T, "half": torch.ones(3).half(),
        "bf16": torch.ones(2, 2).bfloat16(), "steps": 7,
    }  # fmt: skip
    saved(tmp_path / "pytorch_model.bin", state)
    assert convert(tmp_path, tmp_path) == [tmp_path / "model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == state.keys() - {"steps"}
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in found)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "older form"])
def test_shards_become_shards_with_an_index(tmp_path: Path, options: dict[str, Any]) -> None:
    model = write_tiny_model(tmp_path / "safe")
    tensors = load_file(model / "model.safetensors")
    source = tmp_path / "pickled"
    source.mkdir()
    names = sorted(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, own in halves.items():
        saved(source / file, {name: tensors[name] for name in own}, **options)
    saved(source / "training_args.bin", {"not": "tensors"})
    places = {name: file for file, own in halves.items() for name in own}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (source / "config.json").write_text((model / "config.json").read_text())
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    target = tmp_path / "out"
    written = convert(source, target)
    assert [path.name for path in written] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in tensors.items():
        assert torch.equal(load_file(target / index[name])[name], tensor)
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".safetensors") == [
        "config.json", "model.safetensors.index.json",
    ]  # fmt: skip


def test_tensors_may_lie_one_step_deeper(tmp_path: Path) -> None:
    saved(tmp_path / "model.pt", {"state_dict": {"a": SHARED}, "epoch": 3})
    convert(tmp_path, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "older form"])
def test_code_is_refused_and_does_not_run(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": SHARED, "b": Evil(tmp_path / "ran")}, **options)
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        convert(tmp_path, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="nowhere is no folder"):
        convert(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConvertError, match=r"has no pickled checkpoint: none of pytorch_model\*\.bin"):
        convert(tmp_path, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin is damaged"):
        convert(tmp_path, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConvertError, match="is not loaded: EOFError"):
        convert(tmp_path, tmp_path)
    saved(tmp_path / "pytorch_model.bin", [SHARED])
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin holds no tensors by name"):
        convert(tmp_path, tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-2.bin"}}))
    with pytest.raises(ConvertError, match=r"has no pytorch_model-2\.bin, which pytorch_model\.bin\.index\.json names"):
        convert(tmp_path, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(ConvertError, match="outside its folder"):
        convert(tmp_path, tmp_path)
    index.unlink()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConvertError, match=r"has model\.safetensors already"):
        convert(tmp_path, tmp_path)


def test_a_tensor_in_two_files_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for number in (1, 2):
        saved(tmp_path / f"pytorch_model-{number}.bin", {"a": SHARED})
    with pytest.raises(ConvertError, match=r"pytorch_model-2\.bin holds a, which an earlier file holds"):
        convert(tmp_path, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin"}


def test_the_command_converts_and_says_what_is_next(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": SHARED})
    command = [sys.executable, "-m", "aiollm", "convert", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"now: aiollm serve {tmp_path}" in done.stdout and "pytorch_model.bin -> model.safetensors" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "already" in again.stderr
