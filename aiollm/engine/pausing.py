"""Who makes room when the pool is full: rows are paused, those first that lose least by it.

    fcfs   who is least senior: arrived last, on the queue's clock
    sjf    who has the longest way to go, so that short jobs end (shortest job first)
    hrrn   who has waited least for what it will have cost (highest response ratio next)

Under the last two, rows of lower priority go first. The most senior row is never paused for another's sake: it ends,
then the next one is first. So everybody ends, whatever the order.
"""

from collections.abc import Iterable
from typing import Literal

from aiollm.engine.queue import seniority
from aiollm.engine.rows import Row

PauseOrder = Literal["fcfs", "sjf", "hrrn"]


def victim(rows: Iterable[Row], order: PauseOrder, steps: dict[int, int], now: float) -> Row | None:
    """The row to pause, None where no more than one is left; `steps` are tokens to come, by row index.

    `rows` come in order of admission: of equals the one that was admitted last is paused.
    """
    rest = sorted(rows, key=lambda row: seniority(row.request))[1:]
    if not rest or order == "fcfs":
        return rest[-1] if rest else None
    lowest = max(row.request.priority for row in rest)
    rest = [row for row in reversed(rest) if row.request.priority == lowest]
    if order == "sjf":
        return max(rest, key=lambda row: steps[row.index])
    return min(rest, key=lambda row: (now - row.request.arrived) / (row.request.known + steps[row.index]))
