"""Special tokens that a user has typed become the tokens of their text, where that is wanted.

A tokenizer looks for special tokens before it normalizes a text. A mark within a typed one hides it from that search,
and a first step of the normalizer takes the marks out: what is left is cut as any other text is. Tokens that a chat
template has written around it are found as ever.
"""

from collections.abc import Collection
from typing import Any

import tokenizers
from tokenizers import normalizers

from aiollm.text.folder import TextError

MARK = "\ufdd0"  # one of Unicode's noncharacters: it has no meaning in any text


class Typed:
    """The special tokens of one tokenizer, whose normalizer drops marks as soon as this is made."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Collection[int]) -> None:
        """`special` are the ids of special tokens. Raises TextError where a mark cannot hide one."""
        found = [token for id, token in backend.get_added_tokens_decoder().items() if id in special]
        for token in found:
            if token.normalized or len(token.content) < 2:
                raise TextError(f"--split_special_tokens: this model's {token.content!r} cannot be told from text")
        self._tokens = [token.content for token in found]
        drop, own = normalizers.Replace(MARK, ""), backend.normalizer
        backend.normalizer = drop if own is None else normalizers.Sequence([drop, own])

    def marked(self, value: Any) -> Any:
        """A text, or texts in lists and dicts, with a mark in each special token."""
        match value:
            case str():
                return self._marked(value)
            case list():
                return [self.marked(item) for item in value]
            case dict():
                return {key: self.marked(item) for key, item in value.items()}
        return value

    def _marked(self, text: str) -> str:
        for token in self._tokens:
            while token in text:  # again where one has overlapped itself
                text = text.replace(token, token[0] + MARK + token[1:])
        return text
