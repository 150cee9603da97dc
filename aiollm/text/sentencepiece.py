"""SentencePiece vocabularies: the `.model` file, and the tokenizer that encodes as SentencePiece does.

A `.model` file is a protocol buffer (sentencepiece_model.proto). Its wire format is simple enough to be read here, and
the vocabulary is all that is needed of the library.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aiollm.text.folder import TextError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # the lower one-eighth block that stands for a space


class Piece(NamedTuple):
    """A token: its score, and what kind it is."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """A vocabulary, and what is done to text before it. The index of a piece is its token id."""

    pieces: Sequence[Piece]
    unigram: bool = False  # else byte-pair encoding
    dummy_prefix: bool = True  # a space is put before each text, and before what follows a special token
    prefix_once: bool = False  # before the text only, and not before one that begins with a space
    squeeze: bool = False  # runs of spaces become one, those at the ends none
    charsmap: bytes = b""  # SentencePiece's compiled normalisation
    byte_fallback: bool = True

    def named(self, *kinds: int) -> list[str]:
        """The pieces of these kinds."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]


def parse(data: bytes) -> Model:
    """A `.model` file. Raises TextError where it is none, or asks for what is not supported."""
    try:
        fields = list(_fields(data))
        pieces = [_piece(_bytes(value)) for number, value in fields if number == 1]
        trainer, normalizer = (dict(_fields(_bytes(dict(fields).get(number, b"")))) for number in (2, 3))
        charsmap = _bytes(normalizer.get(2, b""))
    except (ValueError, IndexError, struct.error) as error:
        raise TextError(f"it is no SentencePiece model: {error}") from error
    if not pieces:
        raise TextError("it is no SentencePiece model: it has no pieces")
    if (kind := trainer.get(3, 1)) not in (1, 2):
        raise TextError(f"SentencePiece models of type {kind!r} are not supported, only unigram and BPE")
    if trainer.get(24, 0):
        raise TextError("SentencePiece models that write spaces behind words are not supported")
    return Model(
        pieces,
        unigram=kind == 1,
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        charsmap=charsmap,
        byte_fallback=any(piece.kind == BYTE for piece in pieces),
    )


def build(model: Model) -> Tokenizer:
    """The tokenizer of a vocabulary, with control and user-defined pieces as added tokens.

    It differs from SentencePiece in two corners, where the tokenizers library does: a unigram model takes the text
    <0x41> for the byte that it names, and where a charsmap is there the second character of CR LF, or a second mark on
    one letter, is lost.
    Raises TextError where a piece is there twice.
    """
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    if len(ids) != len(model.pieces):
        raise TextError(f"the vocabulary holds {len(model.pieces) - len(ids)} tokens twice")
    unknown = next(iter(model.named(UNKNOWN)), None)
    core: models.Model
    if model.unigram:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        core = models.Unigram(scores, None if unknown is None else ids[unknown], model.byte_fallback)
    else:
        core = models.BPE(
            vocab=ids,
            merges=_merges(model, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    tokenizer = Tokenizer(core)
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix and model.prefix_once and not model.squeeze:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    back += [decoders.ByteFallback()] if model.byte_fallback else []
    back += [decoders.Fuse(), decoders.Strip(" ", 1, 0)] if model.dummy_prefix else [decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back)
    special = [AddedToken(token, special=True, normalized=False) for token in model.named(CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in model.named(USER_DEFINED)])
    return tokenizer


def _merges(model: Model, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The score of a piece is the rank of every merge that makes it; of two that make the same the lower ids win."""
    parts = set(model.named(NORMAL, USER_DEFINED, UNUSED))
    merges = []
    for piece in model.pieces:
        if piece.kind == NORMAL:
            pairs = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
            found = [(left, right) for left, right in pairs if left in parts and right in parts]
            found.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            merges += [(piece.score, pair) for pair in found]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return [pair for _, pair in merges]


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, NORMAL)
    return Piece(_bytes(fields.get(1, b"")).decode(), score, kind if isinstance(kind, int) else NORMAL)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it has a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer message: varints as int, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7, len(data))  # other wire types are of the past
        if at + size > len(data):
            raise ValueError(f"it ends within the field at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next field does."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"it has a number of more than 64 bits at byte {at}")
