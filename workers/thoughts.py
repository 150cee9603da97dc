"""A limit to what a model thinks: behind so many tokens of it nothing but the closing tag is drawn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aiollm.wire.sampling import ThoughtLimit

SPACE = b" \t\r\n"


class Limit:
    """A filter of constraints.py. Thoughts are found as parsers find them: in the text, however it is cut."""

    def __init__(self, limit: ThoughtLimit, pieces: Sequence[bytes]) -> None:
        """`pieces` are the bytes of each id."""
        thoughts = limit.thoughts
        self._left = limit.tokens
        self._open, self._close = thoughts.open.text.encode(), thoughts.close.text.encode()
        self._ids = thoughts.close.ids
        self._written = 0  # of these, behind the last token that was allowed
        self._pieces = pieces
        self._taken = 0
        self._thinks: bool | None = True if thoughts.opened else None  # None: that is not decided
        self._text = b""  # as far as it may hold a part of a tag

    def __call__(self, tokens: Sequence[int], line: NDArray[np.int32]) -> None:
        """Clear the bits of what may not follow the generated tokens, unless that leaves nothing."""
        for id in tokens[self._taken :]:
            if self._thinks is not False:
                self._take(id)
        self._taken = len(tokens)
        if self._thinks and self._left <= 0:
            word, bit = divmod(self._ids[self._written], 32)
            if word < len(line) and line[word] >> bit & 1:
                line.fill(0)
                line.view(np.uint32)[word] = np.uint32(1 << bit)

    def _take(self, id: int) -> None:
        self._text += self._pieces[id] if id < len(self._pieces) else b""
        if self._thinks is None:
            self._text = self._text.lstrip(SPACE)
            if not self._text.startswith(self._open):
                self._thinks = None if self._open.startswith(self._text) else False
                return
            self._thinks, self._text = True, self._text[len(self._open) :]
        elif self._left > 0:
            self._left -= 1
        else:
            self._written = self._written + 1 if id == self._ids[self._written] else 0
        if self._close in self._text or self._written == len(self._ids):
            self._thinks = False
        self._text = self._text[max(len(self._text) - len(self._close) + 1, 0) :]
