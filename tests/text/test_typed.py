"""Special tokens that users type: which of them are text, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tiny_tokenizer import (
    IM_END,
    IM_START,
    byte_alphabet,
    write_byte_tokenizer,
    write_sentencepiece_tokenizer,
    write_wordpiece_tokenizer,
)
from tokenizers import AddedToken, models, pre_tokenizers

from aiollm.text.folder import TextError
from aiollm.text.tokenizer import Tokenizer

KINDS = [write_byte_tokenizer, write_sentencepiece_tokenizer, write_wordpiece_tokenizer]


def bytes_with(*special: AddedToken) -> bytes:
    """The definition of a tokenizer of bytes, with these special tokens from id 256 on."""
    made = tokenizers.Tokenizer(
        models.BPE(vocab={token: byte for byte, token in enumerate(byte_alphabet())}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(list(special))
    return made.to_str().encode()


@pytest.mark.parametrize("write", KINDS)
def test_typed_special_tokens_are_cut_as_the_library_cuts_text(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = str(write(tmp_path))
    library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer, splitting = Tokenizer.load(folder), Tokenizer.load(folder, split_special_tokens=True)
    special = [token.content for token in library.get_added_tokens_decoder().values()]
    for text in ("Hello  wörld 你", *(f"He{token} w{token}{token}" for token in special), "".join(special), *special):
        library.encode_special_tokens = True
        as_text = library.encode(text, add_special_tokens=False).ids
        library.encode_special_tokens = False
        assert splitting.encode_many([text], False, typed=True) == [as_text]
        plain = library.encode(text, add_special_tokens=False).ids
        assert splitting.encode(text, False) == tokenizer.encode(text, False) == plain
        assert tokenizer.encode_many([text], False, typed=True) == [plain]


def test_typed_text_within_another_leaves_the_others_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_byte_tokenizer(tmp_path)), split_special_tokens=True)
    typed = tokenizer.marked({"a": ["x<|im_end|>", 5, None, {"b": "<|im_start|><|im_end|>"}]})
    first, number, nothing, last = typed["a"]
    assert (number, nothing) == (5, None)
    ids = tokenizer.encode(f"<|im_start|>{first}<|im_end|>{last['b']}", False)
    assert ids == [IM_START, *b"x<|im_end|>", IM_END, *b"<|im_start|><|im_end|>"]


@pytest.mark.parametrize("text", ["ababab", "xabab", "xababab", "ab\ufdd0ab", "abababababab"])
def test_special_tokens_that_overlap_are_text_too(text: str) -> None:
    special = AddedToken("abab", normalized=False), AddedToken("xabab", normalized=False)
    tokenizer = Tokenizer(bytes_with(*special), split_special_tokens=True)
    assert tokenizer.encode_many([text], False, typed=True) == [[*text.replace("\ufdd0", "").encode()]]


def test_tokens_that_are_special_by_their_name_are_text_too() -> None:
    backend = tokenizers.Tokenizer.from_str(bytes_with().decode())
    backend.add_tokens([AddedToken("</s>", normalized=False), AddedToken("<b>", normalized=False)])
    tokenizer = Tokenizer(backend.to_str().encode(), named={"eos_token": "</s>"}, split_special_tokens=True)
    assert tokenizer.encode_many(["</s><b>"], False, typed=True) == [[*b"</s>", 257]]


@pytest.mark.parametrize("token", [AddedToken("<s>", normalized=True), AddedToken("你", normalized=False)], ids=str)
def test_a_tokenizer_that_cannot_tell_them_from_text_is_refused(token: AddedToken) -> None:
    assert Tokenizer(bytes_with(token)).encode(token.content, False) == [256]
    with pytest.raises(TextError, match=f"--split_special_tokens: .*'{token.content}'"):
        Tokenizer(bytes_with(token), split_special_tokens=True)
