"""Rule L: credit is time. How many KV slots a decoding row is given ahead of its position."""

from aiollm.wire.messages import MOST_CREDIT

HORIZON = 0.150  # seconds of steps that credit should cover
SHARE = 0.02  # of the pool, at most, over all rows


class CreditPolicy:
    """Learns the duration of a step from the result headers; a stalled row doubles the horizon for a while."""

    def __init__(self) -> None:
        self.step_seconds = 0.010
        self._boost = 1.0

    def observe(self, device_us: int, stalled: bool) -> None:
        """Take one result header."""
        if device_us:
            self.step_seconds += 0.1 * (device_us * 1e-6 - self.step_seconds)
        self._boost = min(8.0, self._boost * 2) if stalled else max(1.0, self._boost * 0.99)

    def ahead(self, rows: int, pool: int, available: int) -> int:
        """Slots ahead per row, for `rows` decoding rows, `available` free or evictable slots of a pool of `pool`."""
        wanted = min(MOST_CREDIT, int(HORIZON * self._boost / self.step_seconds) + 2)
        rows = max(1, rows)
        return max(1, min(wanted, int(SHARE * pool * self._boost) // rows, available // (2 * rows)))
