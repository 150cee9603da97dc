"""Grammars are tried out beside the event loop before a request is taken: what a worker gets works.

llguidance bounds the work and the memory that a grammar may take; here are a bound for its text and one for the time.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from llguidance import LLTokenizer

from aiollm.grammar.llguidance import GrammarError, matcher_of, tokenizer_of
from aiollm.text.tokenizer import Tokenizer
from aiollm.wire.sampling import Grammar

MAX_BYTES = 128 * 1024  # of one grammar
KEPT_BYTES = 16 * 1024 * 1024  # of all whose verdict is kept
SECONDS = 5.0


class Grammars:
    """Verdicts by grammar, the latest ones. From the event loop only."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = SECONDS, kept: int = KEPT_BYTES) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._kept = kept
        self._threads = ThreadPoolExecutor(2, "grammars")
        self._verdicts: OrderedDict[Grammar, asyncio.Future[str]] = OrderedDict()
        self._bytes = 0

    async def check(self, grammar: Grammar) -> None:
        """Raises GrammarError where the grammar cannot be followed, or does not show within the time that it can."""
        if _size(grammar) > MAX_BYTES:
            raise GrammarError(f"it has {_size(grammar)} bytes, at most {MAX_BYTES} are allowed")
        verdict = self._verdicts.get(grammar)
        if verdict is None:
            verdict = asyncio.get_running_loop().run_in_executor(self._threads, self._try, grammar)
            self._verdicts[grammar] = verdict
            self._bytes += _size(grammar)
            while self._bytes > self._kept:
                self._bytes -= _size(self._verdicts.popitem(last=False)[0])
        else:
            self._verdicts.move_to_end(grammar)
        try:
            async with asyncio.timeout(self._seconds):
                reason = await asyncio.shield(verdict)
        except TimeoutError:
            raise GrammarError(f"it is too complex: it was not compiled within {self._seconds:g} s") from None
        if reason:
            raise GrammarError(reason)

    @property
    def kept(self) -> int:
        """Bytes of the grammars whose verdict is known."""
        return self._bytes

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


def _size(grammar: Grammar) -> int:
    return len(grammar.source.encode("utf-8", "surrogatepass"))
