"""The tensors of a decoder: their names, shapes, and of which tensors of a checkpoint each is put together.

Logical names are those of single tensors (`layers.3.q`); a family maps them to its checkpoint's names. Parameters are
what the decoder computes with: `layers.3.qkv` holds this rank's rows of q, k and v below one another.
"""

from typing import NamedTuple

from aiollm.workers.model.spec import DecoderSpec
from aiollm.workers.tp import Shard


class Piece(NamedTuple):
    """Part of a parameter: the region `take` of the checkpoint's tensor, put into the rows from `row` on."""

    source: str  # logical name
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    take: tuple[slice, ...]  # one slice for each dimension
    row: int


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def parameters(spec: DecoderSpec, rank: int, size: int) -> list[Parameter]:
    """All parameters of one rank. A tied output layer is none: it is the embedding."""
    shard = Shard(spec, rank, size)
    width = spec.head_dim
    q = ("q", spec.heads * width, shard.first_head * width, shard.heads * width)
    k = ("k", spec.kv_heads * width, shard.first_kv_head * width, shard.kv_heads * width)
    v = ("v", *k[1:])
    gate = ("gate", spec.intermediate, shard.first_column, shard.intermediate)
    up = ("up", *gate[1:])
    found = [_whole("embedding", spec.vocab, spec.hidden), _whole("norm", spec.hidden)]
    for i in range(spec.layers):
        at = f"layers.{i}."
        found += [_whole(at + "attention_norm", spec.hidden), _whole(at + "mlp_norm", spec.hidden)]
        found.append(_stacked(at, "qkv", [q, k, v], spec.hidden))
        found.append(_columns(at + "o", spec.hidden, spec.heads * width, q[2], q[3]))
        found.append(_stacked(at, "gate_up", [gate, up], spec.hidden))
        found.append(_columns(at + "down", spec.hidden, spec.intermediate, gate[2], gate[3]))
        if spec.qk_norm:
            found += [_whole(at + "q_norm", width), _whole(at + "k_norm", width)]
        if spec.qkv_bias:
            found.append(_stacked(at, "qkv_bias", [(f"{name}_bias", *rest) for name, *rest in (q, k, v)]))
        if spec.o_bias:
            found.append(_whole(at + "o_bias", spec.hidden))
        if spec.mlp_bias:
            found.append(_stacked(at, "gate_up_bias", [(f"{name}_bias", *rest) for name, *rest in (gate, up)]))
            found.append(_whole(at + "down_bias", spec.hidden))
    if not spec.tied_head:
        rows = slice(shard.first_token, shard.first_token + shard.tokens)
        piece = Piece("head", (spec.vocab, spec.hidden), (rows, slice(None)), 0)
        found.append(Parameter("head", (shard.vocab, spec.hidden), (piece,)))
    return found


def _whole(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, (Piece(name, shape, (slice(None),) * len(shape), 0),))


def _stacked(at: str, name: str, parts: list[tuple[str, int, int, int]], *columns: int) -> Parameter:
    """Parts (source, rows of the whole, first row taken, rows taken) below one another; without columns: a vector."""
    pieces, row = [], 0
    for source, rows, first, count in parts:
        take = (slice(first, first + count), *(slice(None) for _ in columns))
        pieces.append(Piece(at + source, (rows, *columns), take, row))
        row += count
    return Parameter(at + name, (row, *columns), tuple(pieces))


def _columns(name: str, rows: int, columns: int, first: int, count: int) -> Parameter:
    piece = Piece(name, (rows, columns), (slice(None), slice(first, first + count)), 0)
    return Parameter(name, (rows, count), (piece,))
