import operations
import pytest

from aiollm.engine.ledger import Ledger
from aiollm.engine.rows import Row
from aiollm.engine.scheduler import Scheduler

STEPS = 6000  # the million is `make operations`; its result is in tools/results


def test_random_operations_leave_every_slot_with_one_owner():
    totals = operations.run(STEPS)
    assert totals["operations"] >= STEPS and totals["pauses"] > 0 and totals["given_up"] > 0


def known_without_a_count(patch: pytest.MonkeyPatch) -> None:
    """Columns keep up with what was drawn."""
    patch.setattr(Scheduler, "_count", lambda self, rows, alive: None)


def retired_but_active(patch: pytest.MonkeyPatch) -> None:
    """A row that ended is out of the columns."""
    original = Ledger.retire

    def retire(self: Ledger, row: Row, keep: bool = True) -> None:
        original(self, row, keep)
        self.table.active[row.index] = True

    patch.setattr(Ledger, "retire", retire)


def requeued_without_a_state(patch: pytest.MonkeyPatch) -> None:
    """Who waits again is waiting."""
    patch.setattr(Scheduler, "_requeue", lambda self, requests: [self.waiting.push(request) for request in requests])


@pytest.mark.parametrize("break_it", [known_without_a_count, retired_but_active, requeued_without_a_state])
def test_no_world_survives_a_missing_rule(break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        operations.run(STEPS)
