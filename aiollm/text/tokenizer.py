"""Text to token ids and back, over the tokenizer of a model folder."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import tokenizers

from aiollm.text.definition import definition
from aiollm.text.folder import TextError, read_json, special_tokens
from aiollm.text.pieces import piece_rule, token_pieces
from aiollm.text.typed import Typed
from aiollm.wire.sampling import Tag
from aiollm.wire.vocabulary import Vocabulary

# Encoding runs at about 1 MB/s; longer texts go to a thread, so that the event loop stalls for at most about 2 ms.
THREAD_CHARS = 2048
TEXT_CHARS = 32  # that a text of its own costs as much as
NAMES = 1 << 15  # tokens whose texts are kept, and whose bytes are: some 6 and 7 MB
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class _Sections(msgspec.Struct):
    """The one section of a tokenizer.json that we read ourselves; msgspec skips the vocabulary unread."""

    decoder: dict[str, Any] | None = None


class Tokenizer:
    """A vocabulary with its special tokens. Immutable after construction; safe to use from several threads."""

    def __init__(
        self,
        definition: bytes,
        *,
        bos_id: int | None = None,
        eos_ids: Collection[int] = (),
        named: Mapping[str, str] | None = None,
        add_bos: bool = False,
        split_special_tokens: bool = False,
    ) -> None:
        """`definition` is the text of a tokenizer.json; `named` are special tokens by name ("eos_token": "</s>").

        `bos_id` and `eos_ids` add to what `named` says. `add_bos`: encode with special tokens puts BOS first, even if
        the definition does not. `split_special_tokens`: those that users have typed are text. Raises TextError if the
        definition cannot be read, or cannot do that.
        """
        try:
            decoder = msgspec.json.decode(definition, type=_Sections).decoder
            self._backend = tokenizers.Tokenizer.from_buffer(definition)
            self.rule = piece_rule(decoder)
        except (ValueError, LookupError, TypeError) as error:
            raise TextError(f"tokenizer.json is truncated, corrupt or too new to read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        tokens = {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}
        tokens |= {index: token.content for index, token in added.items()}
        self.vocab_size = max(tokens, default=-1) + 1
        self.named = dict(named or {})
        found = {name: self._backend.token_to_id(token) for name, token in self.named.items()}
        ids = {name: index for name, index in found.items() if index is not None}
        self.bos_id: int | None = ids.get("bos_token", bos_id)
        self.eos_ids = frozenset(eos_ids) | ({ids["eos_token"]} if "eos_token" in ids else set())
        self._special = frozenset(index for index, token in added.items() if token.special) | frozenset(ids.values())
        self.pieces = None if self.rule is None else token_pieces(self.rule, tokens, added.keys())
        self._typed = Typed(self._backend, self._special) if split_special_tokens else None
        self.token_text = lru_cache(NAMES)(self._token_text)
        """One token for display; bytes that are no whole character show as U+FFFD."""
        self.token_numbers = lru_cache(NAMES)(self._token_numbers)
        """The bytes of one token as a list, which everybody shares."""
        self._visible: dict[frozenset[int], dict[int, bytes]] = {}
        self._bos_prefix = [self.bos_id] if add_bos and self.bos_id is not None and not self._adds(self.bos_id) else []

    @classmethod
    def load(cls, folder: str, split_special_tokens: bool = False) -> "Tokenizer":
        """The tokenizer of a model folder, of whatever kind, and what its config files say of BOS and EOS.

        Raises TextError if there is none or one of the files cannot be read.
        """
        found = definition(folder)
        config = read_json(folder, "tokenizer_config.json")
        model = read_json(folder, "config.json")
        generation = read_json(folder, "generation_config.json")
        nested = model.get("text_config")
        models = [generation, model, nested if isinstance(nested, dict) else {}]
        bos_ids = _first_ids(models, "bos_token_id")
        return cls(
            found.text,
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=_first_ids(models, "eos_token_id"),
            named=special_tokens(config, read_json(folder, "special_tokens_map.json"), found.named),
            add_bos=config.get("add_bos_token", found.add_bos) is True,
            split_special_tokens=split_special_tokens,
        )

    def marked(self, value: Any) -> Any:
        """What a user has typed, a text or texts in lists and dicts, to stand within a text that is to be encoded."""
        return value if self._typed is None else self._typed.marked(value)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, on the calling thread. Raises TextError if the text holds a lone surrogate."""
        return self.encode_many([text], add_special_tokens)[0]

    def encode_many(self, texts: Sequence[str], add_special_tokens: bool, typed: bool = False) -> list[list[int]]:
        """Token ids of each text; `typed` ones are all a user's. Raises TextError if one holds a lone surrogate."""
        listed = list(texts)
        try:
            # The batch call lets the GIL go; plain encode() holds it for a second per MB of text.
            encodings = self._backend.encode_batch_fast(
                self.marked(listed) if typed else listed, add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise TextError("text is not valid Unicode: it holds half of a surrogate pair") from error
        prefix = self._bos_prefix if add_special_tokens else []
        return [prefix + encoding.ids if prefix else encoding.ids for encoding in encodings]

    async def encode_async(self, text: str, add_special_tokens: bool, typed: bool = False) -> list[int]:
        """As `encode`; a text of THREAD_CHARS characters or more is encoded in a thread."""
        return (await self.encode_many_async([text], add_special_tokens, typed))[0]

    async def encode_many_async(
        self, texts: Sequence[str], add_special_tokens: bool, typed: bool = False
    ) -> list[list[int]]:
        """As `encode_many`; texts of together THREAD_CHARS characters or more are encoded in a thread."""
        if sum(len(text) + TEXT_CHARS for text in texts) < THREAD_CHARS + TEXT_CHARS:
            return self.encode_many(texts, add_special_tokens, typed)
        return await asyncio.to_thread(self.encode_many, texts, add_special_tokens, typed)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole id sequence. Ids outside the vocabulary are nothing; broken UTF-8 becomes U+FFFD."""
        pieces = self.visible_pieces(skip_special_tokens)
        if pieces is None or self.rule is None:
            return self.decode_window([index for index in ids if not (skip_special_tokens and self.is_special(index))])
        text = b"".join([pieces.get(index, b"") for index in ids]).decode("utf-8", "replace")
        for _ in range(self.rule.strip_count):
            text = text.removeprefix(self.rule.strip)
        return text

    def decode_window(self, ids: Sequence[int]) -> str:
        """The library's own text of a few ids, special tokens included: for tokens without bytes of their own."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def visible_pieces(self, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> dict[int, bytes] | None:
        """id -> bytes, less the special tokens, but for those `shown`, if they are skipped; None if tokens have no
        bytes of their own. One table is kept for each `shown`, of which a server has one or two."""
        if self.pieces is None or not skip_special_tokens:
            return self.pieces
        if shown not in self._visible:
            self._visible[shown] = _without(self.pieces, self._special - shown)
        return self._visible[shown]

    def special_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of the special tokens among these texts."""
        ids = map(self._backend.token_to_id, texts)
        return frozenset(index for index in ids if index is not None and index in self._special)

    def tag(self, text: str) -> Tag:
        """The text as the ids that write it."""
        ids = self.encode(text, False)
        while len(ids) > 1 and not self.token_bytes(ids[0]).strip():  # a space that begins each text
            ids = ids[1:]
        return Tag(text, tuple(ids), len(ids) == 1 and self.is_special(ids[0]))

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token in the middle of a text; empty for an id outside the vocabulary."""
        if self.pieces is not None:
            return self.pieces.get(index, b"")
        alone = self.decode_window([index])
        return (self.decode_window([index, index]).removeprefix(alone) or alone).encode()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens as bytes, for grammars; None if they have none of their own."""
        if self.pieces is None:
            return None
        pieces = [self.pieces.get(index, b"") for index in range(self.vocab_size)]
        return Vocabulary(pieces, sorted(self._special), sorted(self.eos_ids))

    def _token_numbers(self, index: int) -> list[int]:
        return list(self.token_bytes(index))

    def _token_text(self, index: int) -> str:
        return self.token_bytes(index).decode("utf-8", "replace")

    def token_name(self, index: int) -> str:
        """One token as the vocabulary spells it, for a "Ġhello" of " hello"; empty where it has no such id."""
        return self._backend.id_to_token(index) or ""

    def is_special(self, index: int) -> bool:
        """Whether the id is a control token (BOS, end of turn, ...), which skip_special_tokens leaves out."""
        return index in self._special

    def _adds(self, index: int) -> bool:
        return index in self._backend.encode("", add_special_tokens=True).ids


def _without(pieces: Mapping[int, bytes], ids: Collection[int]) -> dict[int, bytes]:
    return {index: piece for index, piece in pieces.items() if index not in ids}


def _first_ids(configs: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """The token ids under `name` (an int or a list of ints) of the first config that has any."""
    for config in configs:
        value = config.get(name)
        if value is None or value == []:
            continue
        try:
            return msgspec.convert(value if isinstance(value, list) else [value], list[TokenId])
        except msgspec.ValidationError as error:
            raise TextError(f"{name} must be a token id or a list of token ids, not {value!r}") from error
    return []
