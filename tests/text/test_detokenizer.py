import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import tokenizers
from tiny_tokenizer import IM_END, IM_START
from tokenizers import decoders, models, pre_tokenizers, trainers

from aiollm.text.detokenizer import TAIL_IDS, Detokenizer
from aiollm.text.tokenizer import Tokenizer

TEXTS = {
    "emoji": "🙂🎉",
    "ZWJ family": "👨‍👩‍👧",
    "flags": "🇫🇷🇯🇵",
    "CJK": "你好吗",
    "combining": "e\u0301a\u0308\u0323",
    "Arabic": "سلام",
    "mixed": "a é 你 🙂",
    "true U+FFFD": "a\ufffdb",
}
BROKEN = {
    "stray continuation": b"a\x80b",
    "cut emoji": b"\xf0\x9f\x98",
    "cut, then text": b"\xf0\x9f\x98a",
    "cut, then emoji": b"\xe4\xbd\xf0\x9f\x99\x82",
    "surrogate": b"\xed\xa0\x80",
    "overlong": b"\xe0\x80\xaf\xc0\xaf",
    "never valid": b"\xff\xfe\xf8",
}


def cuts(ids: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """Every way of cutting a short sequence; of a long one, single ids and 300 random ways."""
    gaps = len(ids) - 1
    rng = random.Random(7)
    every = range(2**gaps) if gaps <= 10 else [2**gaps - 1, 0, *(rng.getrandbits(gaps) for _ in range(300))]
    for mask in every:
        places = [0, *(place + 1 for place in range(gaps) if mask >> place & 1), len(ids)]
        yield [ids[start:end] for start, end in pairwise(places)]


def stream(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]], tail: Sequence[int] = (), skip: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, tail, skip)
    return "".join([detokenizer.push(chunk) for chunk in chunks]) + detokenizer.finish()


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One id per byte, in either kind of tokenizer."""
    table = {tokenizer.token_bytes(index): index for index in reversed(range(tokenizer.vocab_size))}
    return [table[bytes([byte])] for byte in data]


@pytest.fixture(params=["byte_tokenizer", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("data", [*(text.encode() for text in TEXTS.values()), *BROKEN.values()], ids=[*TEXTS, *BROKEN])
def test_every_cut_of_byte_tokens_joins_to_the_whole_decode(tokenizer, data):
    ids = byte_ids(tokenizer, data)
    expected = tokenizer.decode(ids)
    assert expected == data.decode("utf-8", "replace")
    for chunks in cuts(ids):
        assert stream(tokenizer, chunks) == expected


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", [" Hello world", "  Hello", "Hello 你é🙂 w", " "])
def test_every_cut_of_real_encodings_with_special_tokens_joins_to_the_whole_decode(tokenizer, text, skip):
    special = next(iter(tokenizer.eos_ids))
    plain = tokenizer.encode(text, True)
    for ids in (plain, [special, *plain], [*plain[:2], special, *plain[2:], special]):
        expected = tokenizer.decode(ids, skip)
        for chunks in cuts(ids):
            assert stream(tokenizer, chunks, skip=skip) == expected


def test_merges_that_cross_characters_stream_as_the_library_decodes():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text * 3 for text in TEXTS.values()], trainer)
    trained = Tokenizer(library.to_str().encode())
    rng = random.Random(5)
    crossing = 0
    for _ in range(100):
        text = "".join(rng.choices(list(TEXTS.values()), k=4))
        ids = trained.encode(text, False)
        crossing += sum("\ufffd" in trained.token_text(index) for index in ids)
        for chunks in ([[index] for index in ids], [ids[:3], ids[3:]]):
            assert stream(trained, chunks) == library.decode(ids) == text
        random_ids = [rng.randrange(trained.vocab_size) for _ in range(20)]
        assert stream(trained, [[index] for index in random_ids]) == library.decode(random_ids)
    assert crossing > 20


def test_random_ids_in_random_cuts_join_to_the_whole_decode(tokenizer):
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(12)]
        for skip in (True, False):
            single = stream(tokenizer, [[index] for index in ids], skip=skip)
            assert single == stream(tokenizer, [ids[:5], [], ids[5:]], skip=skip) == tokenizer.decode(ids, skip)


def test_only_an_unfinished_character_is_held_back(byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer, (), True)
    given = [detokenizer.push([byte]) for byte in "a🙂é".encode()]
    assert given == ["a", "", "", "", "🙂", "", "é"]
    assert detokenizer.finish() == ""


def test_no_replacement_character_before_a_character_completes(tokenizer):
    for text in TEXTS.values():
        detokenizer = Detokenizer(tokenizer, (), True)
        given = [detokenizer.push([index]) for index in byte_ids(tokenizer, text.encode())]
        assert "".join(given) == text
        assert "".join(given).count("\ufffd") == text.count("\ufffd")


def test_special_token_inside_a_character_does_not_break_it_when_skipped(byte_tokenizer):
    ids = [0xF0, 0x9F, IM_START, 0x99, 0x82]
    assert stream(byte_tokenizer, [[index] for index in ids]) == "🙂"
    assert stream(byte_tokenizer, [[index] for index in ids], skip=False) == "\ufffd<|im_start|>\ufffd\ufffd"


def test_finish_gives_an_unfinished_character_once(byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer, (), True)
    assert detokenizer.push([0xE4, 0xBD]) == ""
    assert [detokenizer.finish(), detokenizer.finish()] == ["\ufffd", ""]


@pytest.mark.parametrize(
    ("tail", "ids", "expected"),
    [
        (b"Hello", b" x", " x"),
        ("é".encode(), "é".encode(), "é"),
        (b"a\xf0\x9f", b"\x99\x82!", "🙂!"),
        (b"a\xf0\x9f", b"b", "b"),
        (b"a\xf0\x9f", "é".encode(), "é"),
        (b"a\xf0\x9f", b"", ""),
        (b"a\xf0\x9f", b"\x99", "\ufffd"),
        (b"a\xed", b"\xa0", "\ufffd"),
        (b"\x99\x82" * 40, b"a", "a"),
    ],
)
def test_prompt_text_never_leaks_and_its_open_character_is_completed(tokenizer, tail, ids, expected):
    for chunks in cuts(byte_ids(tokenizer, ids)) if ids else [[]]:
        assert stream(tokenizer, chunks, tail=byte_ids(tokenizer, tail)) == expected


def test_unfinished_prompt_character_survives_a_skipped_token(byte_tokenizer):
    assert stream(byte_tokenizer, [[IM_END], [0x99], [0x82]], tail=[0xF0, 0x9F]) == "🙂"


@pytest.mark.parametrize(
    ("tail", "skip", "expected"),
    [
        ([], True, "H"),
        ([1], True, "H"),
        ([1], False, " H"),
        ([1, 259], True, " H"),
        ([1, 270], True, " H"),
        ([2] * TAIL_IDS, True, " H"),
    ],
    ids=["no prompt", "BOS skipped", "BOS shown", "BOS and a space", "BOS and text", "end of a longer prompt"],
)
def test_sentencepiece_first_space_goes_only_at_the_start_of_the_whole_text(
    sentencepiece_tokenizer, tail, skip, expected
):
    assert sentencepiece_tokenizer.token_bytes(260) == b" H"
    assert stream(sentencepiece_tokenizer, [[260]], tail=tail, skip=skip) == expected


def test_wordpiece_text_joins_to_the_whole_decode_for_every_cut(wordpiece_tokenizer):
    for skip in (True, False):
        ids = [1, 3, 4, 5, 6, 7, 8, 9, 2, 2, 10]
        expected = wordpiece_tokenizer.decode(ids, skip)
        assert expected.startswith("unknown words, and" if skip else "[CLS] unknown")
        for chunks in cuts(ids):
            assert stream(wordpiece_tokenizer, chunks, skip=skip) == expected


def test_unknown_decoder_with_byte_tokens_never_cuts_a_character():
    pieces = ["▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = tokenizers.Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(library.to_str().encode())
    assert tokenizer.pieces is None
    smile = [2 + byte for byte in "🙂".encode()]
    ids = [0, 1, *smile, 0, *smile, *smile, 1]
    assert library.decode(ids) == "ab🙂 a🙂🙂b"
    for chunks in cuts(ids):
        assert stream(tokenizer, chunks) == library.decode(ids)
    assert stream(tokenizer, [[index] for index in [0, *smile[:3]]]) == "a\ufffd\ufffd\ufffd"
    assert stream(tokenizer, [[index] for index in [*smile[3:], 0]], tail=[0, *smile[:3]]) == "🙂 a"


def test_wordpiece_continues_a_prompt_with_its_space(wordpiece_tokenizer):
    assert stream(wordpiece_tokenizer, [[4], [5], [6]], tail=[8, 3]) == "known words"


def test_spaces_between_special_tokens_can_be_left_out(wordpiece_tokenizer):
    for spaces, expected in ((True, "and [SEP] [SEP] and"), (False, "and [SEP][SEP] and")):
        detokenizer = Detokenizer(wordpiece_tokenizer, (), False, spaces_between_special_tokens=spaces)
        assert detokenizer.push([8, 2, 2, 8]) + detokenizer.finish() == expected


@pytest.mark.parametrize(
    ("kind", "mark", "hidden", "text"),
    [
        ("byte_tokenizer", "<|im_start|>", IM_END, "<|im_start|><|im_start|>"),
        ("wordpiece_tokenizer", "[SEP]", 1, "[SEP] [SEP]"),
    ],
)
def test_some_special_tokens_may_be_shown_while_others_are_skipped(kind, mark, hidden, text, request):
    tokenizer = request.getfixturevalue(kind)
    shown = tokenizer.special_ids((mark, "and", "a", "nothing like it"))
    assert len(shown) == 1
    ids = [*shown, hidden, *shown]
    detokenizer = Detokenizer(tokenizer, (), True, shown=shown)
    assert detokenizer.push(ids) + detokenizer.finish() == text
    assert stream(tokenizer, [ids]) == ""
