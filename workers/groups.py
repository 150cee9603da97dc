"""Which layers share a KV slot.

Layers of one lifetime are shared out to groups of one size. The i-th layers of all groups keep keys and values in the
same pool, each group's at slots of its own: so one pool serves short sequences, which fill it with all of their layers,
and long ones, of whose layers with a window it need hold but the end.
"""

from typing import NamedTuple

from aiollm.workers.model.spec import DecoderSpec

LONG = 4  # windows: the sequence for which the size of groups is chosen, where models go on for so long


class Groups(NamedTuple):
    """Group 0 sees everything, the others have the window."""

    window: int
    """Positions that a query sees, its own included; 0 where there is one group."""
    pools: int
    """Layers of a group, at most."""
    places: tuple[tuple[int, int], ...]
    """Group and pool of each layer."""

    @property
    def each(self) -> int:
        """Groups in all: slots of a token that all layers see."""
        return 1 + max(group for group, _ in self.places)


def one(spec: DecoderSpec) -> Groups:
    """All layers in one group, whatever they see."""
    return Groups(0, spec.layers, tuple((0, layer) for layer in range(spec.layers)))


def lifetimes(spec: DecoderSpec) -> Groups:
    """Layers that see everything, and groups of those with a window where that saves memory: for a sequence of LONG
    windows, or as long as they get. A model whose layers all have a window has one group."""
    windowed = [layer for layer in range(spec.layers) if 0 < spec.reach(layer)[1] < spec.max_position]
    others = [layer for layer in range(spec.layers) if layer not in windowed]
    if not windowed or not others:
        return one(spec)
    length = min(LONG, spec.max_position / spec.window)

    def taken(groups: int) -> float:
        return max(len(others), -(-len(windowed) // groups)) * (length + groups)

    groups = min(range(1, -(-len(windowed) // len(others)) + 1), key=taken)
    if taken(groups) >= spec.layers * length:
        return one(spec)
    places = {layer: (0, at) for at, layer in enumerate(others)}
    places |= {layer: (1 + at % groups, at // groups) for at, layer in enumerate(windowed)}
    pools = max(pool for _, pool in places.values()) + 1
    return Groups(spec.window, pools, tuple(places[layer] for layer in range(spec.layers)))
