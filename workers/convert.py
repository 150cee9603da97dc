"""Turns a pickled checkpoint into safetensors: python -m aiollm convert FOLDER

Files are read with torch's loader for weights alone, which runs no code of theirs: one that holds anything but tensors
and plain values is refused.
"""

import argparse
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PATTERNS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
TRAINING = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state)")
NESTED = ("state_dict", "model", "module")  # under which some programs keep the tensors
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.spm")


class ConvertError(ValueError):
    """The checkpoint cannot be converted: what is wrong, with the file's name."""


def convert(folder: Path, target: Path) -> list[Path]:
    """Write the tensors of `folder` as safetensors into `target`, which may be the same folder; the files written.

    One file of the checkpoint is in memory at a time. Files appear under their names when all are whole. Another
    target gets the configuration and the tokenizer as well. Raises ConvertError.
    """
    if already := sorted(target.glob("*.safetensors")):
        raise ConvertError(f"{target} has {already[0].name} already")
    sources = _sources(folder)
    target.mkdir(parents=True, exist_ok=True)
    many = len(sources) > 1
    places: dict[str, str] = {}
    written: list[tuple[Path, Path]] = []
    try:
        for number, source in enumerate(sources, 1):
            name = f"model-{number:05}-of-{len(sources):05}.safetensors" if many else "model.safetensors"
            print(f"{source.name} -> {name}", file=sys.stderr, flush=True)
            tensors = _tensors(source)
            if twice := sorted(tensors.keys() & places.keys()):
                raise ConvertError(f"{source} holds {twice[0]}, which an earlier file holds as well")
            places |= dict.fromkeys(tensors, name)
            written.append((target / f".{name}.{os.getpid()}", target / name))
            save_file(tensors, written[-1][0], {"format": "pt"})
            del tensors
        for part, whole in written:
            part.rename(whole)
    finally:
        for part, _ in written:
            part.unlink(missing_ok=True)
    if many:
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}, indent=2) + "\n")
    if not target.samefile(folder):
        for path in [path for pattern in SMALL for path in folder.glob(pattern) if "index.json" not in path.name]:
            shutil.copyfile(path, target / path.name)
    return [whole for _, whole in written]


def _sources(folder: Path) -> list[Path]:
    """The pickled files: those of an index, or else of the first pattern that finds any."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            outside = [name for name in named if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{index} is damaged: it has no weight_map of names ({error!r})") from None
        if outside:
            raise ConvertError(f"{index}: names files outside its folder: {', '.join(outside)}")
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise ConvertError(f"{folder} has no {', '.join(missing)}, which {index.name} names")
        return [folder / name for name in named]
    if not folder.is_dir():
        raise ConvertError(f"{folder} is no folder")
    for pattern in PATTERNS:
        if found := [path for path in sorted(folder.glob(pattern)) if not TRAINING.match(path.name)]:
            return found
    raise ConvertError(f"{folder} has no pickled checkpoint: none of {', '.join(PATTERNS)}")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, each with memory of its own as safetensors wants it."""
    try:
        # Mapped, a tensor is in memory only while it is written; older files, which are no archives, cannot be.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001  torch raises whatever its reader meets
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConvertError(f"{path} is damaged, or holds more than tensors and is not loaded: {reason}") from None
    found = next((found[name] for name in NESTED if isinstance(found, Mapping) and _is_state(found.get(name))), found)
    if not _is_state(found):
        raise ConvertError(f"{path} holds no tensors by name")
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage().data_ptr()
            whole = (
                tensor.is_contiguous() and storage not in seen and tensor.nbytes == tensor.untyped_storage().nbytes()
            )
            seen.add(storage)
            tensors[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _is_state(value: Any) -> bool:
    """Whether a value is a mapping of names, of tensors at least in part."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(tensor, torch.Tensor) for tensor in value.values())


def main() -> int:
    """Convert, and say what to do next; the exit status."""
    parser = argparse.ArgumentParser(prog="aiollm convert", description="Turn a pickled checkpoint into safetensors.")
    parser.add_argument("folder", type=Path, help="Hugging Face folder with *.bin, *.pt or *.pth files")
    parser.add_argument("--output", type=Path, help="another folder for the result (the same one)")
    options = parser.parse_args()
    try:
        written = convert(options.folder, options.output or options.folder)
    except (ConvertError, OSError) as error:
        print(f"aiollm: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in written)
    print(f"{len(written)} file(s), {size / 1e9:.2f} GB; now: aiollm serve {written[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
