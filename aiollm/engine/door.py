"""Who may begin: one round of admission looks at the running rows once, then at one waiting request after the other."""

from collections.abc import Iterator

from aiollm.engine.ledger import Ledger
from aiollm.engine.outlook import Outlook, look, newcomers
from aiollm.engine.pace import ChunkBudget
from aiollm.engine.policy import Gauge, Policy
from aiollm.engine.queue import Queue
from aiollm.engine.request import Request, State

ROUND = 10  # iterations after which a request that did not fit is looked at again, as nobody ended meanwhile


class Door:
    """Before the rows of one epoch."""

    def __init__(self, ledger: Ledger, waiting: Queue, policy: Policy, chunks: ChunkBudget) -> None:
        self.policy = policy
        self._ledger, self._waiting, self._chunks = ledger, waiting, chunks
        self._refused: tuple[Request, int, int] | None = None  # who did not fit, after how many retired and iterations

    def look(self) -> Outlook:
        """The running rows as they are now."""
        return look(self._ledger, self._chunks.tokens(len(self._ledger.running)))

    def round(self, now: float) -> Iterator[tuple[Request, ...]]:
        """Those that may begin, each with its group, until somebody does not fit. They have begun before the next ones
        are asked for."""
        gauge: tuple[Outlook, Gauge] | None = None
        while (head := self._next(now)) is not None:
            if not self._ledger.running and len(head.group) < 2:  # who is alone fits: `submit` saw to it
                yield (head,)  # a look would take half a millisecond of its first token
                continue
            if gauge is None:
                outlook = self.look()
                gauge = outlook, self.policy.open(outlook.view)
            joined = self._joining(head, *gauge)
            if not joined and not self._ledger.running:  # a group of several, each of which fits alone
                joined, gauge = (head,), None
                for other in head.group:
                    other.group = ()  # they never fit together
            if not joined:
                self._refused = head, self._ledger.retired, self._ledger.iterations
                return
            yield joined

    def _next(self, now: float) -> Request | None:
        """The request to be looked at now: the head of the queue, unless it did not fit a moment ago."""
        if not self._waiting or not self._ledger.free_rows:
            return None
        head = self._waiting.head(now)
        if head is None or self._refused is None or self._refused[0] is not head:
            return head
        _, retired, iterations = self._refused
        return head if retired != self._ledger.retired or self._ledger.iterations - iterations >= ROUND else None

    def _joining(self, head: Request, outlook: Outlook, gauge: Gauge) -> tuple[Request, ...]:
        """The head of the queue and the rest of its group, if they fit; else nobody."""
        ledger, index = self._ledger, self._ledger.index
        group: tuple[Request, ...] = (head,)
        if head.admitted is None and 1 < len(head.group) <= ledger.limits.rows:
            group = tuple(new for new in head.group if new.admitted is None and new.state is State.WAITING)
        found = index.peek(index.root(head.namespace), head.tokens()[:-1]) if ledger.may_match(head) else []
        kind = self.policy.history.number(head.kind)
        if len(group) > len(ledger.free_rows) or not gauge.join(newcomers(outlook, found, group, kind)):
            return ()
        return group
