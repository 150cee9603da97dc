from collections import Counter
from dataclasses import replace

import pytest

from aiollm.workers.model.parameters import Piece, parameters
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

SPEC = DecoderSpec(
    layers=2, hidden=10, heads=4, kv_heads=2, head_dim=6, intermediate=8, vocab=11, max_position=8, norm_eps=1e-6,
    rope=Rope(6, 1e4), tied_head=False, qk_norm="head", qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
OTHERS = {
    "heads": replace(SPEC, qk_norm="heads", norm_bias=True, gated=False, parallel=True),
    "width": replace(
        SPEC, qk_norm="width", pre_norm=False, post_norm=True, embedding_norm=True, learned_positions=True
    ),
}
specs = pytest.mark.parametrize("spec", [SPEC, *OTHERS.values()], ids=["head", *OTHERS])
WHOLE = {
    "embedding", "positions", "embedding_norm", "norm", "attention_norm", "mlp_norm", "attention_post_norm",
    "mlp_post_norm", "o_bias", "down_bias", "norm_bias", "attention_norm_bias",
}  # fmt: skip


def taken(piece: Piece) -> list[range]:
    """The indices taken of each dimension of the source."""
    return [range(*part.indices(size)) for part, size in zip(piece.take, piece.shape, strict=True)]


@specs
@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_fill_their_parameter_without_gap_or_overlap(spec: DecoderSpec, size: int) -> None:
    for rank in range(size):
        for parameter in parameters(spec, rank, size):
            row = 0
            for piece in parameter.pieces:
                assert piece.row == row
                row += len(taken(piece)[0])
                assert [len(columns) for columns in taken(piece)[1:]] == list(parameter.shape[1:])
            assert row == parameter.shape[0] or (parameter.name == "head" and row < parameter.shape[0])


@specs
@pytest.mark.parametrize("size", [2, 4])
def test_every_split_tensor_is_taken_whole_by_the_ranks_together(spec: DecoderSpec, size: int) -> None:
    counts: dict[str, Counter[tuple[int, int]]] = {}
    for rank in range(size):
        for piece in (piece for parameter in parameters(spec, rank, size) for piece in parameter.pieces):
            first, *rest = taken(piece)
            columns = rest[0] if rest else range(1)
            counts.setdefault(piece.source, Counter()).update((i, j) for i in first for j in columns)
    whole = WHOLE | ({"q_norm", "k_norm"} if spec.qk_norm == "head" else set())
    shapes = {piece.source: piece.shape for p in parameters(spec, 0, size) for piece in p.pieces}
    for source, seen in counts.items():
        rows, *rest = shapes[source]
        part = source.rpartition(".")[2]
        copies = size if part in whole else 1
        if size == 4 and part in {"k", "v", "k_bias", "v_bias", "k_norm"} - whole:
            copies = 2  # two KV heads on four ranks
        assert seen == Counter({(i, j): copies for i in range(rows) for j in range(rest[0] if rest else 1)}), source


def test_parts_that_a_spec_lacks_have_no_parameters() -> None:
    bare = replace(SPEC, qk_norm=None, qkv_bias=False, o_bias=False, mlp_bias=False, tied_head=True)
    assert [p.name for p in parameters(bare, 0, 1) if p.name.startswith("layers.1") or "." not in p.name] == [
        "embedding", "norm", "layers.1.attention_norm", "layers.1.mlp_norm", "layers.1.qkv", "layers.1.o",
        "layers.1.gate_up", "layers.1.down",
    ]  # fmt: skip
