"""Grammars are tried out in processes of their own before a request is taken: what a worker gets works.

What it takes to compile a grammar may be anything; a bound for its text is here, those for time and memory are in
grammar/trial.py. Several are tried out at once, so that those that take long leave the others their share.
"""

import asyncio
from collections import OrderedDict
from functools import partial

from aiollm.api.errors import ApiError
from aiollm.grammar.llguidance import GrammarError
from aiollm.grammar.trial import Verdict
from aiollm.grammar.trials import NoTrial, Trials
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar
from aiollm.wire.vocabulary import Vocabulary

MAX_BYTES = 128 * 1024  # of one grammar
KEPT_BYTES = 16 * 1024 * 1024  # of all whose verdict is kept
SECONDS = 5.0  # of computing for one grammar, and for its turn to come before
AT_ONCE = 8


class Grammars:
    """Verdicts by grammar, the latest ones. From the event loop only."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS, kept: int = KEPT_BYTES) -> None:
        self._textless = tokenizer.pieces is None
        self._seconds = seconds
        self._kept = kept
        self._trials = Trials(partial(_vocabulary, tokenizer), tokenizer.vocab_size, seconds)
        self._free = asyncio.Semaphore(AT_ONCE)
        self._verdicts: OrderedDict[Grammar, asyncio.Task[Verdict]] = OrderedDict()
        self._bytes = 0

    async def check(self, grammar: Grammar) -> Grammar:
        """The grammar as workers should have it. Raises GrammarError where it cannot be followed, or does not show
        within the time that it can, and ApiError where others keep the machine busy for so long that this is not known.
        """
        check_size(len(grammar.source))  # before work that goes by the length
        check_size(_size(grammar))
        task = self._verdicts.get(grammar)
        if task is None:
            task = asyncio.create_task(self._verdict(grammar))
            task.add_done_callback(lambda task: self._forget_failed(grammar, task))
            self._verdicts[grammar] = task
            self._bytes += _size(grammar)
            while self._bytes > self._kept:
                self._bytes -= _size(self._verdicts.popitem(last=False)[0])
        else:
            self._verdicts.move_to_end(grammar)
        verdict = await asyncio.shield(task)
        if verdict.reason:
            raise GrammarError(verdict.reason)
        assert verdict.grammar is not None
        return verdict.grammar

    @property
    def kept(self) -> int:
        """Bytes of the grammars whose verdict is known."""
        return self._bytes

    async def _verdict(self, grammar: Grammar) -> Verdict:
        """The outcome of a trial, as soon as there is room for it. Raises ApiError where there is none in time."""
        if self._textless:
            return Verdict("the tokens of this model have no text of their own")
        try:
            async with asyncio.timeout(self._seconds):
                await self._free.acquire()
        except TimeoutError:
            raise _busy(f"this one's turn did not come within {self._seconds:g} s") from None
        try:
            return await self._trials.attempt(grammar)
        except GrammarError as error:
            return Verdict(str(error))
        except NoTrial as error:
            raise _busy(str(error)) from error
        finally:
            self._free.release()

    def _forget_failed(self, grammar: Grammar, task: asyncio.Task[Verdict]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._verdicts.get(grammar) is task:
            del self._verdicts[grammar]
            self._bytes -= _size(grammar)


def check_size(size: int) -> None:
    """Raises GrammarError where a grammar of at least so many bytes has too many."""
    if size > MAX_BYTES:
        raise GrammarError(f"it has {size} bytes or more, at most {MAX_BYTES} are allowed")


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    vocabulary = tokenizer.vocabulary
    assert vocabulary is not None
    return vocabulary


def _busy(reason: str) -> ApiError:
    text = f"other grammars are being tried out: {reason}"
    return ApiError(503, text, code="grammars_busy", headers={"Retry-After": "5"})


def _size(grammar: Grammar) -> int:
    return len(grammar.source.encode("utf-8", "surrogatepass"))
