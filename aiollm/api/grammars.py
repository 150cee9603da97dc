"""Grammars are tried out beside the event loop before a request is taken: what a worker gets works.

llguidance bounds the work and the memory that a grammar may take; here are a bound for its text and one for the time.
"""

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from llguidance import LLTokenizer

from aiollm.api.errors import ApiError
from aiollm.grammar.llguidance import GrammarError, matcher_of, tokenizer_of
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar

MAX_BYTES = 128 * 1024  # of one grammar
KEPT_BYTES = 16 * 1024 * 1024  # of all whose verdict is kept
SECONDS = 5.0  # for one grammar, and for a thread to be free before
THREADS = 2

Trial = tuple[asyncio.Future[str], float]
"""What will be why a grammar cannot be followed, empty if it can; and when its thread began, of time.monotonic()."""


class Grammars:
    """Trials by grammar, the latest ones. From the event loop only."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS, kept: int = KEPT_BYTES) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._kept = kept
        self._threads = ThreadPoolExecutor(THREADS, "grammars")
        self._free = asyncio.Semaphore(THREADS)
        self._trials: OrderedDict[Grammar, asyncio.Task[Trial]] = OrderedDict()
        self._bytes = 0

    async def check(self, grammar: Grammar) -> None:
        """Raises GrammarError where the grammar cannot be followed, or does not show within the time that it can, and
        ApiError where others keep the threads busy for so long that it is not even tried."""
        check_size(len(grammar.source))  # before work that goes by the length
        check_size(_size(grammar))
        task = self._trials.get(grammar)
        if task is None:
            task = asyncio.create_task(self._begun(grammar))
            task.add_done_callback(lambda task: self._forget_failed(grammar, task))
            self._trials[grammar] = task
            self._bytes += _size(grammar)
            while self._bytes > self._kept:
                self._bytes -= _size(self._trials.popitem(last=False)[0])
        else:
            self._trials.move_to_end(grammar)
        verdict, began = await asyncio.shield(task)
        try:
            async with asyncio.timeout(began + self._seconds - time.monotonic()):
                reason = await asyncio.shield(verdict)
        except TimeoutError:
            raise GrammarError(f"it is too complex: it was not compiled within {self._seconds:g} s") from None
        if reason:
            raise GrammarError(reason)

    @property
    def kept(self) -> int:
        """Bytes of the grammars whose verdict is known."""
        return self._bytes

    async def _begun(self, grammar: Grammar) -> Trial:
        """A trial, as soon as there is a thread for it. Raises ApiError where there is none in time."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._free.acquire()
        except TimeoutError:
            message = f"other grammars are being tried out: this one's turn did not come within {self._seconds:g} s"
            raise ApiError(503, message, code="grammars_busy", headers={"Retry-After": "5"}) from None
        verdict = asyncio.get_running_loop().run_in_executor(self._threads, self._try, grammar)
        verdict.add_done_callback(lambda _: self._free.release())
        return verdict, time.monotonic()

    def _forget_failed(self, grammar: Grammar, task: asyncio.Task[Trial]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._trials.get(grammar) is task:
            del self._trials[grammar]
            self._bytes -= _size(grammar)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        vocabulary = self._tokenizer.vocabulary
        if vocabulary is None:
            raise GrammarError("the tokens of this model have no text of their own")
        return tokenizer_of(vocabulary, self._tokenizer.vocab_size)

    def _try(self, grammar: Grammar) -> str:
        """Why it cannot be followed; empty if it can. In a thread."""
        try:
            matcher_of(grammar, self._tokens)
        except GrammarError as error:
            return str(error) or "it is not valid"
        return ""


def check_size(size: int) -> None:
    """Raises GrammarError where a grammar of at least so many bytes has too many."""
    if size > MAX_BYTES:
        raise GrammarError(f"it has {size} bytes or more, at most {MAX_BYTES} are allowed")


def _size(grammar: Grammar) -> int:
    return len(grammar.source.encode("utf-8", "surrogatepass"))
