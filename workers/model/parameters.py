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
    found = [_whole("embedding", spec.vocab, spec.hidden)]
    if spec.learned_positions:
        found.append(_whole("positions", spec.max_position, spec.hidden))
    if spec.embedding_norm:
        found += _norm(spec, "embedding_norm")
    found += _norm(spec, "norm")
    for i in range(spec.layers):
        at = f"layers.{i}."
        for name in _block_norms(spec):
            found += _norm(spec, at + name)
        found += [*_attention(spec, shard, at), *_mlp(spec, shard, at)]
    if spec.reward:
        found += _reward(spec)
    elif not spec.tied_head:
        rows = slice(shard.first_token, shard.first_token + shard.tokens)
        piece = Piece("head", (spec.vocab, spec.hidden), (rows, slice(None)), 0)
        found.append(Parameter("head", (shard.vocab, spec.hidden), (piece,)))
    return found


def _block_norms(spec: DecoderSpec) -> list[str]:
    before = ["attention_norm", "mlp_norm"][: 1 if spec.parallel else 2] if spec.pre_norm else []
    return before + (["attention_post_norm", "mlp_post_norm"] if spec.post_norm else [])


def _attention(spec: DecoderSpec, shard: Shard, at: str) -> list[Parameter]:
    width = spec.head_dim
    q_heads = Share("q_norm", spec.heads, shard.first_head, shard.heads)
    k_heads = Share("k_norm", spec.kv_heads, shard.first_kv_head, shard.kv_heads)
    q, k = (Share(h.source[0], h.whole * width, h.first * width, h.taken * width) for h in (q_heads, k_heads))
    qkv = [q, k, k._replace(source="v")]
    found = [_stacked(at, "qkv", qkv, spec.hidden), _columns(at + "o", spec.hidden, q)]
    if spec.qk_norm == "head":
        found += [_whole(at + "q_norm", width), _whole(at + "k_norm", width)]
    if spec.qk_norm == "heads":
        found += [_stacked(at, h.source, [h], width) for h in (q_heads, k_heads)]
    if spec.qk_norm == "width":
        found += [_stacked(at, f"{x.source}_norm", [x._replace(source=f"{x.source}_norm")]) for x in (q, k)]
    if spec.qkv_bias:
        found.append(_stacked(at, "qkv_bias", _biases(qkv)))
    if spec.o_bias:
        found.append(_whole(at + "o_bias", spec.hidden))
    return found


def _mlp(spec: DecoderSpec, shard: Shard, at: str) -> list[Parameter]:
    up = Share("up", spec.intermediate, shard.first_column, shard.intermediate)
    name, inner = ("gate_up", [up._replace(source="gate"), up]) if spec.gated else ("up", [up])
    found = [_stacked(at, name, inner, spec.hidden), _columns(at + "down", spec.hidden, up)]
    if spec.mlp_bias:
        found += [_stacked(at, f"{name}_bias", _biases(inner)), _whole(at + "down_bias", spec.hidden)]
    return found


def _reward(spec: DecoderSpec) -> list[Parameter]:
    """Small beside the rest, and whole on every rank."""
    score = _whole("score", 1, spec.hidden)
    if spec.reward == "linear":
        return [score]
    inner = [_whole("score_inner", spec.hidden, spec.hidden), _whole("score_inner_bias", spec.hidden)]
    return [*inner, score, _whole("score_bias", 1)]


def _norm(spec: DecoderSpec, name: str) -> list[Parameter]:
    return [_whole(name + suffix, spec.hidden) for suffix in (["", "_bias"] if spec.norm_bias else [""])]


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
