"""The exact bytes of each token, for the two kinds of vocabulary that language models use.

ByteLevel (GPT-2 style): every character of a token stands for one byte. Added tokens are literal text; the tokenizers
library passes them through the byte alphabet too, which spoils those with Latin-1 letters ("<é>" becomes "<\ufffd>").
SentencePiece style: tokens are text with "▁" for a space, and <0xNN> is the byte NN.

Other decoders (WordPiece, Metaspace, CTC, ...) have no rule: there a token's text depends on its neighbours.
"""

import re
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SENTENCEPIECE_STEPS = re.compile(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
# In no byte alphabet, and refused by the latin-1 codec: marks a token as literal text.
NOT_A_BYTE = 0xFFFF


class PieceRule(NamedTuple):
    """How tokens become bytes, and how many `strip` characters go from the start of a whole text."""

    byte_level: bool
    replaces: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: str = ""
    strip_count: int = 0


def piece_rule(decoder: Mapping[str, Any] | None) -> PieceRule | None:
    """The rule behind the `decoder` section of a tokenizer.json, or None if its tokens have no bytes of their own."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = "".join(step["type"] + " " for step in steps)
    if kinds in ("ByteLevel ", "ByteLevel Fuse "):
        return PieceRule(byte_level=True)
    if not SENTENCEPIECE_STEPS.fullmatch(kinds):
        return None
    replaces = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if any("String" not in step["pattern"] for step in replaces) or any(step["stop"] for step in strips):
        return None
    return PieceRule(
        byte_level=False,
        replaces=tuple((step["pattern"]["String"], step["content"]) for step in replaces),
        byte_fallback="ByteFallback" in kinds,
        strip=strips[0]["content"] if strips else "",
        strip_count=strips[0]["start"] if strips else 0,
    )


def token_pieces(rule: PieceRule, tokens: Mapping[int, str], added: Set[int]) -> dict[int, bytes]:
    """id -> bytes for a whole vocabulary; `added` are the ids of those beside the model."""
    if not rule.byte_level:
        return {index: _sentencepiece(rule, token) for index, token in tokens.items()}
    return {index: token.encode() if index in added else _byte_level(token) for index, token in tokens.items()}


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of GPT-2's alphabet: printable Latin-1 is itself, the other 68 bytes follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return (
        {byte: byte for byte in printable}
        | dict.fromkeys(others, NOT_A_BYTE)
        | {0x100 + index: byte for index, byte in enumerate(others)}
    )


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _sentencepiece(rule: PieceRule, token: str) -> bytes:
    for old, new in rule.replaces:
        token = token.replace(old, new)
    if rule.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
        return bytes.fromhex(match[1])
    return token.encode()
