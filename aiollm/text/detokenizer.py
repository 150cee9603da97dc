"""Token ids to text as they come, cut anywhere, without a character ever cut."""

from codecs import utf_8_decode
from collections.abc import Sequence

from aiollm.text.tokenizer import Tokenizer

# Ids of the prompt's end that are looked at: an unfinished character has 3 byte tokens, control tokens may lie between.
TAIL_IDS = 16
# Context and longest hold-back, in ids, for tokens whose text depends on their neighbours.
WINDOW_IDS = 8
HELD_IDS = 16
REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one generated sequence.

    `prompt_tail`: the last TAIL_IDS ids of the prompt or more; fewer are taken to be the whole prompt. All texts from
    `push` and `finish`, joined, are what the ids add to the prompt's text however they were cut; with an empty prompt
    that is `tokenizer.decode(ids)`. At most the 3 bytes of an unfinished character are held back. A character that the
    prompt began and the ids complete is given out whole; one they do not complete is the prompt's affair.

    `spaces_between_special_tokens`: if False, no space stands between neighbouring special tokens. It matters only
    for vocabularies whose decoder writes such spaces (WordPiece and the like). `shown` are ids of special tokens that
    belong to the text even if others are skipped.
    """

    __slots__ = (
        "_window", "_pieces", "_pending", "_strip", "_strip_left", "_of_prompt",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        tail = prompt_tail[-TAIL_IDS:]
        pieces = tokenizer.visible_pieces(skip_special_tokens, shown)
        self._window: _Window | None = None
        if pieces is None or tokenizer.rule is None:
            self._window = _Window(tokenizer, tail, skip_special_tokens, spaces_between_special_tokens, shown)
            return
        self._pieces = pieces
        self._pending = b""
        self._strip = tokenizer.rule.strip
        self._strip_left = tokenizer.rule.strip_count
        self._of_prompt = False
        self.push(tail)
        self._of_prompt = bool(self._pending)
        if len(tail) == TAIL_IDS or self._of_prompt:
            self._strip_left = 0

    def push(self, ids: Sequence[int]) -> str:
        """Text that the ids complete: possibly empty, never half a character."""
        if self._window is not None:
            return self._window.push(ids)
        get = self._pieces.get
        data = get(ids[0], b"") if len(ids) == 1 else b"".join([get(index, b"") for index in ids])
        if self._of_prompt and data:
            self._of_prompt = False
            if not _continues(self._pending, data[:1]):
                self._pending = b""
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return self._stripped(text) if self._strip_left else text

    def finish(self) -> str:
        """The rest: an unfinished character of the generated ids as U+FFFD."""
        if self._window is not None:
            return self._window.finish()
        text = "" if self._of_prompt else self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text

    def _stripped(self, text: str) -> str:
        """`text` without what the decoder strips from the start of a whole text (SentencePiece: one space)."""
        while self._strip_left and text.startswith(self._strip):
            text = text[len(self._strip) :]
            self._strip_left -= 1
        if text:
            self._strip_left = 0
        return text


class _Window:
    """The slower way, for tokens without bytes of their own: decode a few ids again and give out what was added.

    Text that ends in U+FFFD is held back, as it may be an unfinished character, up to HELD_IDS ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, tail: Sequence[int], skip_special: bool, spaces: bool, shown: frozenset[int]
    ) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._skip_special = skip_special
        self._spaces = spaces
        self._context = [index for index in tail if self._visible(index)][-WINDOW_IDS:]
        self._before = tokenizer.decode_window(self._context).rstrip(REPLACEMENT)
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._step(index) for index in ids if self._visible(index)])

    def finish(self) -> str:
        return self._release(self._text()) if self._held else ""

    def _visible(self, index: int) -> bool:
        return not (self._skip_special and self._tokenizer.is_special(index)) or index in self._shown

    def _text(self) -> str:
        return self._tokenizer.decode_window(self._context + self._held)[len(self._before) :]

    def _step(self, index: int) -> str:
        self._held.append(index)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < HELD_IDS:
            return ""
        between = self._context[-1:] + self._held
        if not self._spaces and len(between) == 2 and all(map(self._tokenizer.is_special, between)):
            text = text.removeprefix(" ")
        return self._release(text)

    def _release(self, text: str) -> str:
        self._context = (self._context + self._held)[-WINDOW_IDS:]
        self._before = self._tokenizer.decode_window(self._context)
        self._held = []
        return text


def _continues(start: bytes, byte: bytes) -> bool:
    """Whether `byte` can follow the unfinished UTF-8 sequence `start`: then both still make one character."""
    return len((start + byte).decode("utf-8", "replace")) == 1
