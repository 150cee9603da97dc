import json
import random

import pytest
from tiny_tokenizer import byte_alphabet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from aiollm.text.pieces import BYTE_ALPHABET, NOT_A_BYTE, PieceRule, piece_rule, token_pieces

SENTENCEPIECE = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def pieces(decoder: dict | None, tokens: list[str], added: frozenset[int] = frozenset()) -> list[bytes]:
    rule = piece_rule(decoder)
    assert rule is not None
    return list(token_pieces(rule, dict(enumerate(tokens)), added).values())


def test_byte_level_alphabet_is_the_library_s_and_maps_onto_all_bytes():
    letters = {chr(code) for code, byte in BYTE_ALPHABET.items() if byte != NOT_A_BYTE}
    assert letters == set(pre_tokenizers.ByteLevel.alphabet())
    assert pieces({"type": "ByteLevel"}, byte_alphabet()) == [bytes([byte]) for byte in range(256)]


def test_byte_level_decodes_any_bytes_as_the_library_does():
    alphabet = byte_alphabet()
    library = Tokenizer(models.BPE(vocab={token: byte for byte, token in enumerate(alphabet)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    table = pieces({"type": "ByteLevel"}, alphabet)
    rng = random.Random(1)
    lead = [0xC2, 0xE0, 0xE4, 0xED, 0xF0, 0xF4, 0x80, 0x9F, 0xBD, 0x41, 0xFF]
    for _ in range(3000):
        ids = [rng.choice(lead) if rng.random() < 0.8 else rng.randrange(256) for _ in range(rng.randrange(1, 8))]
        assert b"".join(table[index] for index in ids).decode("utf-8", "replace") == library.decode(ids)


def test_byte_level_added_tokens_are_literal_text():
    tokens = ["Ġ", "é", "<é ▁>"]
    assert pieces({"type": "ByteLevel"}, tokens, frozenset({1, 2})) == [b" ", "é".encode(), "<é ▁>".encode()]


def test_byte_level_token_outside_the_alphabet_is_literal_text():
    assert pieces({"type": "ByteLevel"}, ["a b", "你"]) == [b"a b", "你".encode()]


def test_sentencepiece_tokens_have_spaces_and_raw_bytes():
    tokens = ["▁Hi", "<0xE4>", "<0x0a>", "<0xG1>", "<0xE4>x", "你"]
    assert pieces(SENTENCEPIECE, tokens) == [b" Hi", b"\xe4", b"\n", b"<0xG1>", b"<0xE4>x", "你".encode()]
    assert piece_rule(SENTENCEPIECE) == PieceRule(False, (("▁", " "),), True, " ", 1)


def test_byte_tokens_are_text_without_byte_fallback():
    assert pieces({"type": "Fuse"}, ["<0xE4>"]) == [b"<0xE4>"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Replace(Regex("a+"), "b"),
        None,
    ],
    ids=str,
)
def test_decoders_that_look_at_neighbours_have_no_rule(decoder):
    assert piece_rule(None if decoder is None else json.loads(decoder.__getstate__())) is None
