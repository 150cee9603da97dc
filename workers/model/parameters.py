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
    shape: tuple[int, ...]  # on this rank
    pieces: tuple[Piece, ...]


class Share(NamedTuple):
    """This rank's `taken` of the `whole` rows or columns of one tensor, from `first` on."""

    source: str
    whole: int
    first: int
    taken: int


def parameters(spec: DecoderSpec, rank: int, size: int) -> list[Parameter]:
    """All parameters of one rank. A tied output layer is none: it is the embedding."""
    shard = Shard(spec, rank, size)
    width = spec.head_dim
    q = Share("q", spec.heads * width, shard.first_head * width, shard.heads * width)
    k = Share("k", spec.kv_heads * width, shard.first_kv_head * width, shard.kv_heads * width)
    qkv = [q, k, k._replace(source="v")]
    gate = Share("gate", spec.intermediate, shard.first_column, shard.intermediate)
    gate_up = [gate, gate._replace(source="up")]
    found = [_whole("embedding", spec.vocab, spec.hidden), _whole("norm", spec.hidden)]
    for i in range(spec.layers):
        at = f"layers.{i}."
        found += [_whole(at + "attention_norm", spec.hidden), _whole(at + "mlp_norm", spec.hidden)]
        found.append(_stacked(at, "qkv", qkv, spec.hidden))
        found.append(_columns(at + "o", spec.hidden, q))
        found.append(_stacked(at, "gate_up", gate_up, spec.hidden))
        found.append(_columns(at + "down", spec.hidden, gate))
        if spec.qk_norm:
            found += [_whole(at + "q_norm", width), _whole(at + "k_norm", width)]
        if spec.qkv_bias:
            found.append(_stacked(at, "qkv_bias", _biases(qkv)))
        if spec.o_bias:
            found.append(_whole(at + "o_bias", spec.hidden))
        if spec.mlp_bias:
            found.append(_stacked(at, "gate_up_bias", _biases(gate_up)))
            found.append(_whole(at + "down_bias", spec.hidden))
    if not spec.tied_head:
        rows = slice(shard.first_token, shard.first_token + shard.tokens)
        piece = Piece("head", (spec.vocab, spec.hidden), (rows, slice(None)), 0)
        found.append(Parameter("head", (shard.vocab, spec.hidden), (piece,)))
    return found


def _whole(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, (Piece(name, shape, (slice(None),) * len(shape), 0),))


def _biases(shares: list[Share]) -> list[Share]:
    return [share._replace(source=f"{share.source}_bias") for share in shares]


def _stacked(at: str, name: str, shares: list[Share], *columns: int) -> Parameter:
    """Shares of rows below one another; without columns they are parts of a vector."""
    pieces, row = [], 0
    for share in shares:
        take = (slice(share.first, share.first + share.taken), *(slice(None) for _ in columns))
        pieces.append(Piece(at + share.source, (share.whole, *columns), take, row))
        row += share.taken
    return Parameter(at + name, (row, *columns), tuple(pieces))


def _columns(name: str, rows: int, share: Share) -> Parameter:
    take = (slice(None), slice(share.first, share.first + share.taken))
    return Parameter(name, (rows, share.taken), (Piece(name, (rows, share.whole), take, 0),))
