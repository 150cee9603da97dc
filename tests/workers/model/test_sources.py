import pytest
import torch

from aiollm.workers.model.parameters import Piece, parameters
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.sources import located
from aiollm.workers.model.spec import DecoderSpec

SPEC = DecoderSpec(
    layers=2, hidden=10, heads=8, kv_heads=2, head_dim=3, intermediate=8, vocab=11, max_position=8, norm_eps=1e-6,
    rope=Rope(2, 1e4), tied_head=True, qkv_bias=True, qk_norm="heads",
)  # fmt: skip
NORMS = {"layers.{}.q_norm": "h.{}.q.{}.scale", "layers.{}.k_norm": "h.{}.k.{}.scale"}
Q, K = 24, 6  # rows


def fetched(
    names: dict[str, str], tensors: dict[str, torch.Tensor], name: str, rank: int = 0, size: int = 1
) -> torch.Tensor:
    """A parameter put together from a checkpoint's tensors."""
    parameter = next(p for p in parameters(SPEC, rank, size) if p.name == name)
    merged = torch.full(parameter.shape, torch.nan)
    for at in (at for piece in parameter.pieces for at in located(piece, SPEC, names)):
        assert tensors[at.source].shape == at.shape
        part = tensors[at.source][at.take].reshape(-1, *parameter.shape[1:])
        merged[at.row : at.row + len(part)] = part
    return merged


def test_a_tensor_of_its_own_is_found_by_its_name() -> None:
    piece = Piece("layers.1.o", (10, 24), (slice(None), slice(0, 12)), 0)
    assert located(piece, SPEC, {"layers.{}.o": "h.{}.out"}) == [piece._replace(source="h.1.out")]


def test_parts_below_one_another_are_rows_of_one_tensor() -> None:
    fused = torch.arange(Q + 2 * K, dtype=torch.float32)
    names = {"layers.{}.qkv_bias": "h.{}.bias"}
    assert torch.equal(fetched(names, {"h.1.bias": fused}, "layers.1.qkv_bias"), fused)
    second = fetched(names, {"h.1.bias": fused}, "layers.1.qkv_bias", rank=1, size=2)
    assert second.tolist() == [*range(12, 24), *range(27, 30), *range(33, 36)]
    gate_up = torch.randn(16, 10)
    names = {"layers.{}.gate_up": "h.{}.wide"}
    found = fetched(names, {"h.0.wide": gate_up}, "layers.0.gate_up", rank=1, size=2)
    assert torch.equal(found, torch.cat([gate_up[4:8], gate_up[12:]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_in_turn_are_gathered_by_kv_head(size: int) -> None:
    q, k, v = torch.randn(Q, 10), torch.randn(K, 10), torch.randn(K, 10)
    fused = torch.cat([q[:12], k[:3], v[:3], q[12:], k[3:], v[3:]])
    for rank in range(size):
        found = fetched({"layers.{}.qkv_by_group": "h.{}.w"}, {"h.0.w": fused}, "layers.0.qkv", rank, size)
        heads, head = Q // size, rank * 2 // size * 3 if size > 1 else 0
        rows = 6 if size == 1 else 3
        expected = torch.cat([q[rank * heads : (rank + 1) * heads], k[head : head + rows], v[head : head + rows]])
        assert torch.equal(found, expected)


def test_rows_may_be_tensors_of_their_own() -> None:
    tensors = {f"h.0.q.{i}.scale": torch.full((3,), float(i)) for i in range(8)}
    assert fetched(NORMS, tensors, "layers.0.q_norm", rank=1, size=2)[:, 0].tolist() == [4, 5, 6, 7]
    with pytest.raises(KeyError):
        fetched(NORMS, {}, "layers.0.k_norm")


def test_a_table_without_a_name_is_a_mistake() -> None:
    with pytest.raises(KeyError, match=r"no name for layers\.0\.down"):
        located(Piece("layers.0.down", (10, 8), (slice(None), slice(None)), 0), SPEC, {})
