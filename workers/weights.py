"""Fill a decoder's parameters: from a folder of safetensors, or with random numbers."""

import math
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from aiollm.kernels.weight import Int8Weight, Weight, Weights
from aiollm.workers.checkpoint import DTYPES, CheckpointError, Stored, stored
from aiollm.workers.model.parameters import Parameter, parameters
from aiollm.workers.model.sources import located
from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.reading import PART_BYTES, WHOLE_BYTES, Part, read
from aiollm.workers.tp import Shard, TensorParallel

# Tensors in some checkpoints that are no text decoder's weights: tables that older code stored along, and eyes.
HARMLESS = re.compile(r"rotary(_pos)?_emb\.inv_freq$|^(vision_tower|multi_modal_projector)\.")
LINEAR = re.compile(r"(^|\.)(qkv|o|gate_up|up|down|head)$")
SPREAD = 0.02  # standard deviation of random weights

Quantize = Callable[[torch.Tensor], Int8Weight]


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
    """This rank's parameters out of `folder`, each byte read once, straight into its merged place.

    `names` is a family's table. `quantize`, where given, makes what the linear layers hold. `progress` is told the
    fraction that is done, by one thread at a time. Every tensor that the model needs must be there, in its shape, and
    every tensor that is there must be needed: CheckpointError otherwise, and where a file is damaged.
    """
    found = stored(folder)
    names = _as_saved(names, found.keys())
    wanted = [
        parameter._replace(pieces=tuple(at for piece in parameter.pieces for at in located(piece, spec, names)))
        for parameter in parameters(spec, tp.rank, tp.size)
    ]
    _compare(found, wanted, spec, names)
    wanted.sort(key=lambda parameter: min((found[at.source].path, found[at.source].offset) for at in parameter.pieces))
    return _Assembly(spec, wanted, dtype, device, tp, quantize).run(found, progress)


def dummy(
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    quantize: Quantize | None = None,
    seed: int = 0,
) -> Weights:
    """Random parameters: the same model for the same seed, however many ranks share it (on one kind of device).

    Each parameter is drawn as a whole, in place and in its dtype; where ranks share it, they draw all and keep theirs.
    """
    assembly = _Assembly(spec, parameters(spec, tp.rank, tp.size), dtype, device, tp, quantize)
    wholes = {whole.name: whole for whole in parameters(spec, 0, 1)}
    for parameter in assembly.wanted:
        whole = wholes[parameter.name]
        drawn = torch.empty(whole.shape, dtype=dtype, device=device)
        if whole.name.endswith("norm"):
            drawn.fill_(0.0 if spec.unit_offset else 1.0)
        else:
            generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(whole.name.encode()))
            drawn.normal_(0.0, SPREAD, generator=generator)
        if tp.size > 1:
            merged = torch.zeros(parameter.shape, dtype=dtype, device=device)
            for own, at in zip(parameter.pieces, whole.pieces, strict=True):
                taken = drawn[at.row : at.row + at.shape[0]][own.take]
                merged[own.row : own.row + len(taken)] = taken
            drawn = merged
        assembly.keep(parameter.name, drawn)
    return assembly.weights


def outline(spec: DecoderSpec, dtype: torch.dtype, tp: TensorParallel, eight_bits: bool = False) -> Weights:
    """This rank's parameters without their numbers, on the device "meta"; with `eight_bits` as they are quantised."""
    meta = torch.device("meta")
    quantize = _quantized_outline if eight_bits else None
    assembly = _Assembly(spec, parameters(spec, tp.rank, tp.size), dtype, meta, tp, quantize)
    for parameter in assembly.wanted:
        assembly.keep(parameter.name, torch.empty(parameter.shape, dtype=dtype, device=meta))
    return assembly.weights


def stored_bytes(weights: Weights) -> int:
    """Bytes that the parameters take, or would on another device than "meta"; what two names share counts once."""
    parts = [weight if isinstance(weight, Int8Weight) else (weight,) for weight in weights.values()]
    found: dict[int, int] = {}
    for tensor in (tensor for tensors in parts for tensor in tensors):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()  # of which a rank's part of a tied embedding is a view
            found[storage._cdata] = storage.nbytes()
        else:  # a reordered tensor has no storage, and no second name
            found[id(tensor)] = tensor.nbytes
    return sum(found.values())


def _quantized_outline(weight: torch.Tensor) -> Int8Weight:
    return Int8Weight(torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32))


class _Assembly:
    """The parameters of one rank, while their parts arrive."""

    def __init__(
        self,
        spec: DecoderSpec,
        wanted: Sequence[Parameter],
        dtype: torch.dtype,
        device: torch.device,
        tp: TensorParallel,
        quantize: Quantize | None,
    ) -> None:
        self.spec, self.wanted, self.dtype, self.device, self.tp, self.quantize = (
            spec, wanted, dtype, device, tp, quantize
        )  # fmt: skip
        self.weights: dict[str, Weight] = {}
        self._merged: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def run(self, found: Mapping[str, Stored], progress: Callable[[float], None]) -> Weights:
        """Read all parameters, those first that lie first."""
        parts = [part for parameter in self.wanted for part in self._parts(parameter, found)]
        left = Counter(part.owner for part in parts)
        total, done = sum(part.nbytes for part in parts), 0

        def landed(part: Part) -> None:
            nonlocal done
            with self._lock:
                left[part.owner] -= 1
                complete = not left[part.owner]
            if complete:
                self.keep(part.owner, self._merged.pop(part.owner))
            with self._lock:
                done += part.nbytes
                progress(done / total)

        read(parts, self.device, landed)
        for parameter in self.wanted:
            if parameter.name not in self.weights:  # a shard of the vocabulary that is nothing but padding
                self.keep(parameter.name, self._target(parameter, slice(None)))
        return self.weights

    def keep(self, name: str, merged: torch.Tensor) -> None:
        """A parameter that is complete becomes what the decoder computes with."""
        if name == "head" and self.spec.normalized_head:
            merged = torch.nn.functional.normalize(merged.float()).to(self.dtype)
        kept = {name: merged}
        if name == "embedding" and self.spec.tied_head:
            kept["head"] = _tied_head(merged, Shard(self.spec, self.tp.rank, self.tp.size))
        for each, weight in kept.items():
            self.weights[each] = self.quantize(weight) if self.quantize and LINEAR.search(each) else weight

    def _parts(self, parameter: Parameter, found: Mapping[str, Stored]) -> list[Part]:
        """What has to be read for a parameter, in parts of PART_BYTES or WHOLE_BYTES at most but never less than a
        row."""
        parts = []
        for piece in parameter.pieces:
            at = found[piece.source]
            one_row = len(piece.shape) < len(parameter.shape)  # of ours is a tensor of its own
            shape, take = ((1, *piece.shape), (slice(1), *piece.take)) if one_row else (piece.shape, piece.take)
            first, last, _ = take[0].indices(shape[0])
            width = math.prod(shape[1:])
            row_bytes = width * DTYPES[at.dtype].itemsize
            as_stored = DTYPES[at.dtype] == self.dtype and all(
                columns.indices(size) == (0, size, 1) for columns, size in zip(take[1:], shape[1:], strict=True)
            )
            step = max(1, (WHOLE_BYTES if as_stored and self.device.type == "cuda" else PART_BYTES) // row_bytes)
            for begin in range(first, last, step):
                end = min(last, begin + step)
                row = piece.row + begin - first
                target = partial(self._target, parameter, slice(row, row + end - begin))
                rows, offset = (end - begin, *shape[1:]), at.offset + begin * row_bytes
                parts.append(Part(at.path, offset, rows, DTYPES[at.dtype], take[1:], parameter.name, target))
        return parts

    def _target(self, parameter: Parameter, rows: slice) -> torch.Tensor:
        """Rows of a parameter, which is allocated when the first of its parts comes."""
        with self._lock:
            if parameter.name not in self._merged:
                # Zeros pad the last shard of the vocabulary.
                make = torch.zeros if parameter.name == "head" else torch.empty
                self._merged[parameter.name] = make(parameter.shape, dtype=self.dtype, device=self.device)
            return self._merged[parameter.name][rows]


def _compare(
    found: Mapping[str, Stored], wanted: Sequence[Parameter], spec: DecoderSpec, names: Mapping[str, str]
) -> None:
    """CheckpointError where a checkpoint has not exactly the tensors that are wanted."""
    needed = {piece.source: piece for parameter in wanted for piece in parameter.pieces}
    everything = (piece for parameter in parameters(spec, 0, 1) for piece in parameter.pieces)
    known = {at.source for piece in everything for at in located(piece, spec, names)}
    if spec.tied_head or spec.reward:  # some checkpoints bring an output layer all the same
        known.add(names["head"])
    _refuse("lacks", [name for name in needed if name not in found])
    extra = [name for name in found if name not in known and not HARMLESS.search(name)]
    _refuse("holds, but the model has no place for,", extra)
    _refuse("holds in another shape", [
        f"{name} {list(found[name].shape)} (expected {list(piece.shape)})"
        for name, piece in needed.items()
        if found[name].shape != piece.shape
    ])  # fmt: skip
    _refuse("holds in a format that is not supported", [
        f"{name} {found[name].dtype}" for name in needed if found[name].dtype not in DTYPES
    ])  # fmt: skip


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


def _refuse(what: str, found: list[str], shown: int = 5) -> None:
    if found:
        more = f" and {len(found) - shown} more" if len(found) > shown else ""
        raise CheckpointError(f"the checkpoint {what} {', '.join(found[:shown])}{more}")
