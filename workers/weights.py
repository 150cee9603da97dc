"""Fill a decoder's parameters: from a folder of safetensors, or with random numbers."""

import json
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from aiollm.kernels.weight import Int8Weight, Weight, Weights
from aiollm.workers.model.parameters import Parameter, Piece, parameters
from aiollm.workers.model.sources import located
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard, TensorParallel

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Tensors in some checkpoints that are no text decoder's weights: tables that older code stored along, and eyes.
HARMLESS = re.compile(r"rotary(_pos)?_emb\.inv_freq$|^(vision_tower|multi_modal_projector)\.")
LINEAR = re.compile(r"(^|\.)(qkv|o|gate_up|up|down|head)$")

Quantize = Callable[[torch.Tensor], Int8Weight]


class CheckpointError(ValueError):
    """The tensors of a checkpoint are not those of the model that its configuration describes."""


def load(
    folder: Path,
    spec: DecoderSpec,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    quantize: Quantize | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Weights:
    """This rank's parameters out of `folder`, read tensor by tensor straight into their merged places.

    `names` is a family's table. `quantize`, where given, makes what the linear layers hold. `progress` is told the
    fraction that is done. Every tensor that the model needs must be there, in its shape, and every tensor that is there
    must be needed: CheckpointError otherwise.
    """
    with ExitStack() as stack:
        tensors: dict[str, safe_open] = {}
        for path in _files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            tensors |= dict.fromkeys(file.keys(), file)

        names = _as_saved(names, tensors.keys())
        wanted = [
            parameter._replace(pieces=tuple(at for piece in parameter.pieces for at in located(piece, spec, names)))
            for parameter in parameters(spec, tp.rank, tp.size)
        ]
        needed = {piece.source: piece for parameter in wanted for piece in parameter.pieces}
        ignored = {names["head"]} if spec.tied_head else set()
        everything = (piece for parameter in parameters(spec, 0, 1) for piece in parameter.pieces)
        known = ignored.union(at.source for piece in everything for at in located(piece, spec, names))
        extra = [name for name in tensors if name not in known and not HARMLESS.search(name)]
        _refuse("lacks", [name for name in needed if name not in tensors])
        _refuse("holds, but the model has no place for,", extra)
        slices = {name: tensors[name].get_slice(name) for name in needed}  # type: ignore[no-untyped-call]
        _refuse("holds in another shape", [
            f"{name} {slices[name].get_shape()} (expected {list(piece.shape)})"
            for name, piece in needed.items()
            if tuple(slices[name].get_shape()) != piece.shape
        ])  # fmt: skip
        _refuse("holds in a format that is not supported", [
            f"{name} {view.get_dtype()}" for name, view in slices.items() if view.get_dtype() not in FLOATS
        ])  # fmt: skip
        return _fill(
            spec, wanted, dtype, device, tp, quantize, lambda piece: slices[piece.source][piece.take], progress
        )


def dummy(
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    quantize: Quantize | None = None,
    seed: int = 0,
) -> Weights:
    """Random parameters: the same model for the same seed, however many ranks share it (on one kind of device)."""

    def fetch(piece: Piece) -> torch.Tensor:
        if piece.source.endswith("norm"):
            return torch.full(piece.shape, 0.0 if spec.unit_offset else 1.0, device=device)[piece.take]
        generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(piece.source.encode()))
        return torch.randn(piece.shape, generator=generator, device=device).mul_(0.02)[piece.take]

    wanted = parameters(spec, tp.rank, tp.size)
    return _fill(spec, wanted, dtype, device, tp, quantize, fetch, lambda fraction: None)


def stored_bytes(weights: Weights) -> int:
    """Bytes that the parameters take; a tensor under two names counts once."""
    parts = [weight if isinstance(weight, Int8Weight) else (weight,) for weight in weights.values()]
    # A reordered tensor has no data_ptr, and no second name.
    found = {
        tensor.data_ptr() if tensor.layout == torch.strided else id(tensor): tensor.nbytes
        for tensors in parts
        for tensor in tensors
    }
    return sum(found.values())


def _fill(
    spec: DecoderSpec,
    wanted: list[Parameter],
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    quantize: Quantize | None,
    fetch: Callable[[Piece], torch.Tensor],
    progress: Callable[[float], None],
) -> Weights:
    def kept(name: str, weight: torch.Tensor) -> Weight:
        return quantize(weight) if quantize and LINEAR.search(name) else weight

    total, done = sum(torch.Size(p.shape).numel() for p in wanted), 0
    weights: dict[str, Weight] = {}
    for parameter in wanted:
        merged = torch.zeros(parameter.shape, dtype=dtype, device=device)  # zeros pad the last shard of the vocabulary
        for piece in parameter.pieces:
            part = fetch(piece).reshape(-1, *parameter.shape[1:])
            merged[piece.row : piece.row + len(part)] = part
        if parameter.name == "head" and spec.normalized_head:
            merged = torch.nn.functional.normalize(merged.float()).to(dtype)
        weights[parameter.name] = kept(parameter.name, merged)
        if parameter.name == "embedding" and spec.tied_head:
            weights["head"] = kept("head", _tied_head(merged, Shard(spec, tp.rank, tp.size)))
        done += merged.numel()
        progress(done / total)
    return weights


def _tied_head(embedding: torch.Tensor, shard: Shard) -> torch.Tensor:
    """This rank's rows of the embedding: a view of it, but where the shard needs padding."""
    own = embedding[shard.first_token : shard.first_token + shard.tokens]
    padding = shard.vocab - shard.tokens
    return torch.cat([own, own.new_zeros(padding, own.shape[1])]) if padding else own


def _as_saved(names: Mapping[str, str], tensors: Collection[str]) -> Mapping[str, str]:
    """The names without their first part, where a checkpoint was saved of the part of the model that is called so."""
    first = names["embedding"].partition(".")[0] + "."
    short = {logical: name.removeprefix(first) for logical, name in names.items()}
    return short if names["embedding"] not in tensors and short["embedding"] in tensors else names


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the only one."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if outside := [name for name in named if Path(name).name != name]:
            raise CheckpointError(f"{index}: names files outside its folder: {', '.join(outside)}")
        files = [folder / name for name in named]
    else:
        files = [single]
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}")
    return files


def _refuse(what: str, found: list[str], shown: int = 5) -> None:
    if found:
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        raise CheckpointError(f"the checkpoint {what} {', '.join(found[:shown])}{more}")
