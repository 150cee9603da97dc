import torch

from aiollm.kernels.ref.norm import norm
from aiollm.workers.model.norms import norm_of
from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

SPEC = {
    "layers": 1, "hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 4, "intermediate": 8, "vocab": 10,
    "max_position": 8, "norm_eps": 1e-6, "rope": Rope(4, 1e4), "tied_head": False,
}  # fmt: skip


def test_a_plain_norm_holds_the_parameter_itself() -> None:
    weights = {"norm": torch.randn(8, dtype=torch.bfloat16)}
    found = norm_of(DecoderSpec(**SPEC), weights, "norm")
    assert found.weight is weights["norm"] and found.bias is None and not found.centered


def test_an_offset_is_added_before_it_is_rounded() -> None:
    weights = {"norm": torch.full((8,), 2**-9, dtype=torch.bfloat16)}
    found = norm_of(DecoderSpec(**SPEC, unit_offset=True), weights, "norm")
    assert found.weight.tolist() == [1 + 2**-9] * 8


def test_a_scale_multiplies_all_that_comes_out() -> None:
    weights = {"norm": torch.randn(8), "norm_bias": torch.randn(8)}
    spec = DecoderSpec(**SPEC, centered=True, norm_bias=True)
    x = torch.randn(3, 8)
    plain, scaled = (norm(x, norm_of(spec, weights, "norm", scale)) for scale in (1.0, 0.25))
    torch.testing.assert_close(scaled, plain / 4)
