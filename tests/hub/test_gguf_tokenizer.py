"""The converted tokenizer splits and merges as the original would, and transformers reads it the same way."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from aiollm.hub.errors import HubError
from aiollm.hub.gguf_file import GgufFile
from aiollm.hub.gguf_tokenizer import SPLITS, write_tokenizer

TEXTS = [
    "hello world",
    "  hello   123 4567 ",
    "naïve ☕ 日本語 ½ ٣",
    "It's I'LL\r\n\n\thello,world!",
    "<|im_start|>user\nhello<|im_end|>\n",
    "hello<extra>hello",
    "",
]


def converted(tmp_path: Path, write_gguf: Any, **fields: Any) -> Path:
    write_gguf(tmp_path / "tiny.gguf", fields={f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    with GgufFile(tmp_path / "tiny.gguf") as source:
        write_tokenizer(source.fields, tmp_path, 256)
    return tmp_path


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_equal_those_of_transformers_and_text_comes_back(tmp_path: Path, write_gguf: Any, pre: str) -> None:
    folder = converted(tmp_path, write_gguf, pre=pre)
    ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text).ids == theirs(text).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_smollm_equals_the_tokenizer_it_came_from(tmp_path: Path, write_gguf: Any) -> None:
    folder = converted(tmp_path, write_gguf)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("1", "2")]
    original = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    original.decoder = decoders.ByteLevel()
    for text in TEXTS[:4]:
        assert ours.encode(text).ids == original.encode(text).ids
    assert ours.encode("hello wo").tokens == ["hello", "Ġwo"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["1234", "Ġwo", "r", "l", "d"]),
        ("smollm", ["1", "2", "3", "4", "Ġwo", "r", "l", "d"]),
        ("command-r", ["1", "2", "3", "4", "Ġwo", "r", "l", "d"]),
        ("dbrx", ["123", "4", "Ġwo", "r", "l", "d"]),
        ("tekken", ["1", "2", "3", "4", "Ġworld"]),
        ("gpt-4o", ["123", "4", "Ġwo", "r", "l", "d"]),
        ("qwen2", ["1", "2", "3", "4", "Ġwo", "r", "l", "d"]),
        ("llama-bpe", ["123", "4", "Ġworld"]),
    ],
)
def test_digits_and_whole_words_follow_the_named_rule(
    tmp_path: Path, write_gguf: Any, pre: str, words: list[str]
) -> None:
    tokenizer = Tokenizer.from_file(str(converted(tmp_path, write_gguf, pre=pre) / "tokenizer.json"))
    assert tokenizer.encode("1234 world", add_special_tokens=False).tokens == words


def test_special_tokens_match_whole_and_are_skipped_in_text(tmp_path: Path, write_gguf: Any) -> None:
    tokenizer = Tokenizer.from_file(str(converted(tmp_path, write_gguf) / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>hello<|im_end|><extra>").ids
    assert [ids[0], ids[-2]] == [1, 2]
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "hello<extra>"  # the user-defined token is text


@pytest.mark.parametrize(
    ("fields", "starts"),
    [
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
    ],
)
def test_a_beginning_token_is_added_when_the_file_or_the_family_says_so(
    tmp_path: Path, write_gguf: Any, fields: dict[str, Any], starts: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(converted(tmp_path, write_gguf, **fields) / "tokenizer.json"))
    assert (tokenizer.encode("hello").ids[0] == 1) is starts
    assert tokenizer.encode("hello", add_special_tokens=False).ids[0] != 1


def test_the_settings_hold_the_named_tokens_and_the_chat_template(tmp_path: Path, write_gguf: Any) -> None:
    folder = converted(tmp_path, write_gguf)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "hello"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False) == "hello"


def sentence_piece_fields() -> dict[str, Any]:
    """Pieces in the manner of Llama 2: unknown, control, all bytes, single letters, then merged pieces by rank."""
    merged = ["▁t", "he", "▁the", "in", "ing", "▁a", "▁ing", "th"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(letters))]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentence_piece_ids(text: str, fields: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours with the best score, leftmost first, to the end."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]
        if not joined:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_sentence_piece_scores_become_merges_with_the_same_result(tmp_path: Path) -> None:
    fields = sentence_piece_fields()
    write_tokenizer(fields, tmp_path, 256)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the thing in a hat", "theing ing", "a  the é☕ b", "nothing\nin", " the"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == sentence_piece_ids(text, fields), text
        assert theirs(text).input_ids == tokenizer.encode(text).ids == [1, *ids]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pre": "youtu"}, "pre-tokenizer 'youtu' is not supported; known are default"),
        ({"model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"merges": ["h e", "hello"]}, "an entry that is not two tokens"),
        ({"merges": ["h e", "zz zz"]}, "does not fit the vocabulary"),
        ({"tokens": ["a", "b", "a"]}, "1 tokens twice"),
        ({"token_type": [1, 1]}, "one entry for each of 270 tokens"),
        ({"eos_token_id": 999}, "eos_token_id is 999, the vocabulary has 270"),
    ],
)
def test_a_tokenizer_that_cannot_be_matched_exactly_is_refused(
    tmp_path: Path, write_gguf: Any, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(HubError, match=words):
        converted(tmp_path, write_gguf, **fields)
