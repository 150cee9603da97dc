"""The safetensors files of a model folder: which tensors they hold, and where each one lies."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A file of a checkpoint is damaged, or its tensors are not those of the model that its configuration describes."""


class Stored(NamedTuple):
    """One tensor on disk, row by row."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: str  # as safetensors calls it: F32, BF16
    shape: tuple[int, ...]


def stored(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint by name.

    Headers are checked (lengths, overlaps, gaps), the numbers are not read. Raises CheckpointError with the file's name
    where a file is missing or damaged, two hold a tensor of one name, or one lacks what the index says it holds.
    """
    places = _index(folder)
    found: dict[str, Stored] = {}
    for path in _files(folder, places):
        for name, tensor in _header(path).items():
            if name in found:
                raise CheckpointError(f"{found[name].path} and {path.name} both hold {name}")
            found[name] = tensor
    for name, file in places.items():
        if name not in found or found[name].path.name != file:
            raise CheckpointError(f"{folder / file} has no {name}, which the index of the checkpoint promises")
    return found


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as an index says; empty where there is none."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        named = sorted(set(places.values()))
        outside = [name for name in named if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it has no weight_map of names ({error!r})") from None
    if outside:
        raise CheckpointError(f"{index}: names files outside its folder: {', '.join(outside)}")
    found: dict[str, str] = places
    return found


def _files(folder: Path, places: dict[str, str]) -> list[Path]:
    """The files of the index; without one `model.safetensors`, or where it is called otherwise all that there are."""
    whole = folder / "model.safetensors"
    files = [folder / name for name in sorted(set(places.values()))]
    if not files:
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")) or [whole]
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}")
    return files


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. safetensors checks the header; only the offsets we have to find ourselves."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path} is no safetensors file, or its header of {length} bytes is over the limit of {MAX_HEADER}"
            )
        text = file.read(length)
    try:
        with safe_open(path, framework="numpy"):
            pass
        entries: dict[str, Any] = json.loads(text)
    except (SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged, get it again: {error}") from None
    entries.pop("__metadata__", None)
    return {
        name: Stored(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }
