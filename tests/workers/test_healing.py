"""Which tokens continue a text that was cut off, against trying every token."""

import itertools
import random

import numpy as np
import pytest

from aiollm.wire.vocabulary import Vocabulary
from aiollm.workers.healing import Pieces, healing

WORDS = [b"a", b"b", b"ab", b"abc", b"ca", b"bca", b"", b"<end>", b"b\xff", b"ab"]
END = 7


def pieces_of(words: list[bytes], size: int | None = None) -> Pieces:
    return Pieces(Vocabulary(words, special=[END], eos=[END]), size or len(words))


def follows(words: list[bytes], text: bytes) -> set[int]:
    """The tokens that may come first of those that begin with `text`, by trying out every sequence."""
    usable = [id for id, word in enumerate(words) if word and id != END]
    found = set()
    for count in range(1, len(text) + 1):
        for ids in itertools.product(usable, repeat=count):
            made = [len(words[id]) for id in ids]
            if sum(made[:-1]) < len(text) and b"".join(words[id] for id in ids).startswith(text):
                found.add(ids[0])
    return found


@pytest.mark.parametrize("text", [b"a", b"ab", b"abc", b"abca", b"b\xff", b"c", b"bcab"])
def test_allowed_is_what_can_lead_to_the_whole_text(text: bytes) -> None:
    following = healing(text, pieces_of(WORDS))
    first = following([])
    assert first is not None and sorted(first.tolist()) == sorted(follows(WORDS, text))
    for id in first.tolist():
        rest, after = text[len(WORDS[id]) :], following([id])
        if rest:
            assert after is not None and set(after.tolist()) == follows(WORDS, rest)
        else:
            assert after is None


def test_a_token_that_the_rest_cannot_follow_is_not_allowed() -> None:
    words = [b"x", b"xy", b"xyz", b"yy"]
    first = healing(b"xyz", pieces_of(words))([])
    assert first is not None and first.tolist() == [2], "behind x or xy nothing makes the rest"


def test_random_walks_end_with_the_text() -> None:
    chance = random.Random(3)
    words = [bytes([b]) for b in b"abcd"] + [bytes(chance.choices(b"abcd", k=chance.randint(2, 4))) for _ in range(40)]
    pieces = Pieces(Vocabulary(words, special=[], eos=[]), len(words))
    for _ in range(200):
        text = bytes(chance.choices(b"abcd", k=chance.randint(1, 12)))
        following, ids = healing(text, pieces), list[int]()
        while (allowed := following(ids)) is not None:
            assert isinstance(allowed, np.ndarray) and len(allowed) > 0
            ids.append(chance.choice(allowed.tolist()))
        assert len(ids) <= len(text)
        assert b"".join(words[id] for id in ids).startswith(text)


def test_ids_without_text_behind_the_healed_one_are_no_fault() -> None:
    following = healing(b"ab", pieces_of(WORDS, size=20))
    assert following([2, 19, 6, END]) is None
