"""From what stands on the command line to a local folder that workers and tokenizer can load.

    nothing            the demo model                         demo.py
    FOLDER             a Hugging Face folder, checked here
    FILE.gguf          converted once into the cache          gguf.py
    ORG/NAME           a snapshot from the Hugging Face hub

A folder that the workers could not load is refused here, before any of them starts; what they could not serve, or not
on this device, before its weights are downloaded or converted.
"""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiollm.hub.cache import Progress, build_once
from aiollm.hub.demo import DEMO, demo_folder
from aiollm.hub.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ACCEPTED = "give a folder with config.json and *.safetensors, a .gguf file, or a Hugging Face id like org/name"

MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
PICKLED = (".bin", ".pt", ".pth")
TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # pickled too, but no weights
HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model*", "*.spm", "*.tiktoken"]
WEIGHTS = "*.safetensors"
HUB_SKIPPED = ["consolidated*", "original/*", "onnx/*"]  # the same weights again, for other programs


Check = Callable[[Path], None]
"""Raises HubError where the config.json in a folder is that of a model that cannot be served."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk."""

    folder: str
    name: str  # under which it is served
    origin: str  # for people: where it came from


def resolve(
    model: str | None,
    *,
    revision: str | None = None,
    need_weights: bool = True,
    check: Check = lambda folder: None,
    progress: Progress,
) -> ModelFiles:
    """Finds `model`, downloading or converting it if need be; may take minutes, so call it before serving.

    `revision` is a branch, tag or commit on the hub. Without `need_weights` a folder may lack its safetensors files.
    `check` is asked before weights are downloaded or converted.
    Errors: HubError with what to do.
    """
    if model is None:
        return ModelFiles(str(demo_folder(progress)), DEMO.name, f"demo model ({DEMO.requirement})")
    path = Path(model).expanduser()
    if path.is_dir():
        check_folder(path, need_weights)
        return ModelFiles(str(path.absolute()), path.resolve().name, "folder")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelFiles(
            str(_converted(path.resolve(), check, progress)), path.stem, f"converted from {path.absolute()}"
        )
    if not path.exists() and path.suffix != ".gguf" and HUB_ID.fullmatch(model):
        folder = _snapshot(model, revision, need_weights, check, progress)
        return ModelFiles(str(folder), model, f"Hugging Face hub, {model}" + (f" at {revision}" if revision else ""))
    raise HubError(f"{model!r} is {'no model' if path.exists() else 'not here'}: {ACCEPTED}")


def check_folder(folder: Path, need_weights: bool) -> None:
    """Errors: HubError when `folder` lacks config.json, or safetensors files (all that an index names) if needed."""
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"it holds {inside[0]}, which can be given itself" if inside else ACCEPTED
        raise HubError(f"{folder} has no config.json: {hint}")
    if not need_weights:
        return
    weights = _weight_files(folder)
    for path in weights:
        check_safetensors(path)
    if not weights:
        files = sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
        pickled = [path for path in files if not path.name.startswith(TRAINING)]
        if pickled:
            raise HubError(
                f"{folder} holds only {pickled[0].name} and the like: pickled checkpoints are not loaded, because they "
                f"can run code; convert with: {conversion_command(folder)}"
            )
        raise HubError(f"{folder} has no *.safetensors files; --load_format dummy runs without weights")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, all there, or without an index all that there are."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{index} is damaged: it has no weight_map ({error!r})") from None
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{folder} lacks {len(missing)} of {len(named)} weight files, first {missing[0]}")
    return [folder / name for name in named]


def check_safetensors(path: Path) -> None:
    """Compares the size of the file with what its header promises; a cut download or a git-lfs pointer fails.

    Errors: HubError.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length if length <= MAX_HEADER else 1)
    if length > MAX_HEADER and text != b"{":
        raise HubError(f"{path} is not a safetensors file (a git-lfs pointer? then run git lfs pull)")
    if length > MAX_HEADER:
        raise HubError(f"{path} has a safetensors header of {length} bytes, over the limit of {MAX_HEADER}")
    try:
        entries = json.loads(text)
        end = max((value["data_offsets"][1] for key, value in entries.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise HubError(f"{path} is damaged: its safetensors header cannot be read") from None
    size = path.stat().st_size
    if size != 8 + length + end:
        raise HubError(f"{path} is damaged: {size} bytes, its header says {8 + length + end}; get the file again")


def conversion_command(folder: Path) -> str:
    """A shell command that turns the pickled files of a folder into safetensors."""
    return shlex.join([sys.executable, "-m", "aiollm", "convert", str(folder.absolute())])


def _converted(path: Path, check: Check, progress: Progress) -> Path:
    from aiollm.hub.gguf import convert

    stat = path.stat()
    name = f"{path.stem[:80]}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    source = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return build_once(name, source, lambda folder, _: convert(path, folder, progress, check), progress)


def _snapshot(model: str, revision: str | None, need_weights: bool, check: Check, progress: Progress) -> Path:
    """A snapshot in the hub client's own cache; with no network, the one that is already there.

    The small files come first: they tell whether the weights are worth their download.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # a log wants lines
    progress(f"downloading {model} from the Hugging Face hub", None)
    folder = _fetched(model, revision, HUB_FILES)
    check_folder(folder, need_weights=False)
    if not need_weights:
        return folder
    try:
        weights = _weight_files(folder)
    except HubError:
        weights = []
    if not weights:
        progress(f"looking whether {model} can be served", None)
        check(folder)
        progress(f"downloading the weights of {model}", None)
    folder = _fetched(model, revision, [*HUB_FILES, WEIGHTS])
    check_folder(folder, need_weights)
    return folder


def _fetched(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_SKIPPED))
    except Exception as error:  # the client lets errors of its HTTP, storage and validation libraries through
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise HubError(
            f"{model!r} is no folder here, and the Hugging Face hub did not give it: {reason}. Check the spelling, the "
            "network and, for gated models, HF_TOKEN; or " + ACCEPTED
        ) from error
