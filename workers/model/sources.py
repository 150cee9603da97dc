"""Where a checkpoint keeps the pieces of a decoder, by a family's table of names.

A table maps logical names to the checkpoint's; `{}` stands for the layer. Tensors that a checkpoint keeps below one
another in a single one have the name of that one:

- `layers.{}.qkv`: the rows of q, then of k, then of v;
- `layers.{}.qkv_by_group`: for each KV head the rows of its query heads, then its own of k, then of v;
- `layers.{}.gate_up`: the rows of gate, then of up;
- and the same with `_bias` for their biases.

A name with a second `{}` is that of one row, and stands for its number.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from aiollm.workers.model.parameters import Piece
from aiollm.workers.model.spec import DecoderSpec


class Run(NamedTuple):
    """`rows` of a logical tensor from `first` on, which lie in another one from `at` on."""

    first: int
    at: int
    rows: int


def located(piece: Piece, spec: DecoderSpec, names: Mapping[str, str]) -> list[Piece]:
    """The piece as regions of tensors of the checkpoint: their `source` is the checkpoint's name."""
    layer, part = _split(piece.source)
    at = "layers.{}." if layer else ""
    if name := names.get(at + part):
        if name.count("{}") < 2:
            return [piece._replace(source=name.format(layer))]
        first, last, _ = piece.take[0].indices(piece.shape[0])
        return [
            Piece(name.format(layer, i), piece.shape[1:], piece.take[1:], piece.row + i - first)
            for i in range(first, last)
        ]
    part, bias = part.removesuffix("_bias"), "_bias" if part.endswith("_bias") else ""
    for fused, (total, runs) in _fused(spec, part).items():
        if name := names.get(at + fused + bias):
            shape = (total, *piece.shape[1:])
            return list(_within(piece._replace(source=name.format(layer), shape=shape), piece.shape[0], runs))
    raise KeyError(f"the family's table has no name for {piece.source}")


def _split(source: str) -> tuple[str, str]:
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", source)
    return (found[1], found[2]) if found else ("", source)


def _fused(spec: DecoderSpec, part: str) -> dict[str, tuple[int, list[Run]]]:
    """By fused name: all of its rows, and which of them are those of `part`."""
    q, k, inner = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.intermediate
    if part in ("gate", "up"):
        return {"gate_up": (2 * inner, [Run(0, 0 if part == "gate" else inner, inner)])}
    if part not in ("q", "k", "v"):
        return {}
    width = spec.head_dim
    own = q // spec.kv_heads  # rows of the query heads of one KV head
    rows, behind = {"q": (own, 0), "k": (width, own), "v": (width, own + width)}[part]
    groups = [Run(i * rows, i * (own + 2 * width) + behind, rows) for i in range(spec.kv_heads)]
    in_order = {"q": Run(0, 0, q), "k": Run(0, q, k), "v": Run(0, q + k, k)}[part]
    return {"qkv": (q + 2 * k, [in_order]), "qkv_by_group": (q + 2 * k, groups)}


def _within(piece: Piece, rows: int, runs: list[Run]) -> Iterator[Piece]:
    """The parts of the rows that the piece takes, of `rows` in all, in each of the runs."""
    first, last, _ = piece.take[0].indices(rows)
    for run in runs:
        begin, end = max(first, run.first), min(last, run.first + run.rows)
        if begin < end:
            there = run.at - run.first
            take = (slice(begin + there, end + there), *piece.take[1:])
            yield piece._replace(take=take, row=piece.row + begin - first)
