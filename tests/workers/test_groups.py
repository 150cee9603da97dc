import dataclasses

import pytest

from aiollm.workers.groups import lifetimes, one
from aiollm.workers.model.spec import DecoderSpec

SPEC = DecoderSpec(
    layers=12, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=8, vocab=9, max_position=1024, norm_eps=1e-6,
    rope=None, tied_head=False, window=64,
)  # fmt: skip


def spec(layers: int, globals_: list[int], **fields: int) -> DecoderSpec:
    return dataclasses.replace(SPEC, layers=layers, global_layers=frozenset(globals_), **fields)


def test_every_layer_has_a_place_of_its_own() -> None:
    for layers in range(1, 40):
        for every in range(1, 9):
            groups = lifetimes(spec(layers, list(range(every - 1, layers, every))))
            assert len(set(groups.places)) == len(groups.places) == layers
            assert max(pool for _, pool in groups.places) < groups.pools
            for layer, (group, _) in enumerate(groups.places):
                assert groups.each == 1 or (group == 0) == ((layer + 1) % every == 0)


@pytest.mark.parametrize(
    ("layers", "every", "pools", "each"),
    [(26, 6, 4, 7), (34, 6, 5, 7), (48, 6, 8, 6), (62, 6, 11, 6), (42, 2, 21, 2), (32, 4, 8, 4)],
    ids=["Gemma 3 1B", "Gemma 3 4B", "Gemma 3 12B", "Gemma 3 27B", "Gemma 2 9B", "Command-R7B, OLMo 3"],
)
def test_groups_of_known_models(layers: int, every: int, pools: int, each: int) -> None:
    groups = lifetimes(spec(layers, list(range(every - 1, layers, every))))
    assert (groups.pools, groups.each, groups.window) == (pools, each, 64)
    assert pools * each <= 1.08 * layers, "what short sequences pay"


@pytest.mark.parametrize(
    "alike",
    [
        spec(12, list(range(12))),
        spec(12, []),
        spec(12, [3, 7, 11], window=0),
        spec(12, [3, 7, 11], window=1024),
        spec(12, list(range(11)), max_position=70),
    ],
    ids=["all see everything", "all have a window", "no window", "a window as long as the context", "no gain"],
)
def test_layers_that_live_alike_are_one_group(alike: DecoderSpec) -> None:
    assert lifetimes(alike) == one(alike)
    assert one(alike).each == 1
