from dataclasses import replace

import pytest

from aiollm.workers.model.rotary import Rope
from aiollm.workers.model.spec import DecoderSpec

SPEC = DecoderSpec(
    layers=1, hidden=8, heads=4, kv_heads=2, head_dim=4, intermediate=8, vocab=10, max_position=8, norm_eps=1e-6,
    rope=Rope(4, 1e4), tied_head=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"vocab": -5}, "vocab is -5"),
        ({"kv_heads": 3}, "4 query heads cannot be shared out among 3 KV heads"),
        ({"parallel": True, "post_norm": True}, "parallel layers share the norm before them"),
        ({"rope": None, "global_rope": Rope(8, 1e4)}, "cannot rotate 8 of 4 dimensions"),
        ({"rope": Rope(6, 1e4)}, "cannot rotate 6 of 4 dimensions"),
        ({"rope": Rope(3, 1e4)}, "cannot rotate 3 of 4 dimensions"),
    ],
)
def test_impossible_decoders_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)
