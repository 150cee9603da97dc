import asyncio
import json
import subprocess
import sys
import threading

import pytest
from tiny_tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    VOCAB_SIZE,
    write_byte_tokenizer,
    write_json,
    write_sentencepiece_tokenizer,
)

from aiollm.text.folder import TextError
from aiollm.text.tokenizer import NAMES, THREAD_CHARS, Tokenizer

TEXTS = ["", "Hello world", "日本語 🙂 é\n", " a  b ", "x\x00y", "سلام"]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_encodes_to_byte_values_and_back(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text, False)
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_returns_with_its_first_space_kept_right(sentencepiece_tokenizer, text):
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text, True)) == text


def test_special_tokens_in_text_become_control_tokens_and_are_skipped_on_demand(byte_tokenizer):
    ids = byte_tokenizer.encode("<|im_start|>é<|im_end|>", False)
    assert ids == [IM_START, *"é".encode(), IM_END]
    assert byte_tokenizer.decode(ids) == "é"
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>é<|im_end|>"


def test_size_specials_and_pieces_of_the_byte_tokenizer(byte_tokenizer):
    assert byte_tokenizer.vocab_size == VOCAB_SIZE
    assert byte_tokenizer.bos_id is None
    assert byte_tokenizer.eos_ids == {IM_END}
    assert [index for index in range(300) if byte_tokenizer.is_special(index)] == [END_OF_TEXT, IM_START, IM_END]
    assert byte_tokenizer.token_bytes(0xE4) == b"\xe4"
    assert byte_tokenizer.token_text(0xE4) == "\ufffd"
    assert byte_tokenizer.token_text(IM_END) == "<|im_end|>"


def test_ids_outside_the_vocabulary_are_nothing(byte_tokenizer):
    assert byte_tokenizer.token_bytes(VOCAB_SIZE) == b""
    assert byte_tokenizer.token_text(VOCAB_SIZE) == ""
    assert byte_tokenizer.token_numbers(VOCAB_SIZE) == []
    assert byte_tokenizer.decode([65, VOCAB_SIZE + 7, 66]) == "AB"


def test_texts_and_bytes_of_tokens_are_kept_for_so_many_and_no_more(byte_tokenizer):
    for kept, expected in ((byte_tokenizer.token_text, "A"), (byte_tokenizer.token_numbers, [65])):
        for index in range(NAMES + VOCAB_SIZE):  # most are outside the vocabulary: also those are kept
            kept(index)
        assert kept(65) == kept(65) == expected
        assert kept.cache_info().currsize == NAMES


def test_encode_many_is_encode_of_each(sentencepiece_tokenizer):
    expected = [sentencepiece_tokenizer.encode(text, True) for text in TEXTS]
    assert sentencepiece_tokenizer.encode_many(TEXTS, True) == expected


def test_bos_comes_once_whether_the_definition_or_the_config_adds_it(tmp_path):
    folder = write_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.encode("", True) == [1]
    assert tokenizer.encode("Hello", True)[0] == 1
    assert 1 not in tokenizer.encode("Hello", False)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    write_json(folder, "tokenizer.json", definition)
    assert Tokenizer.load(str(folder)).encode("Hello", True).count(1) == 1


def test_truncation_and_padding_of_the_definition_are_switched_off(tmp_path):
    folder = write_byte_tokenizer(tmp_path)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    write_json(folder, "tokenizer.json", definition)
    assert Tokenizer.load(str(folder)).encode_many(["abcdef", "a"], True) == [list(b"abcdef"), [97]]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {IM_END}),
        ({"config.json": {"eos_token_id": 7}}, {IM_END, 7}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [8, 9]}}, {IM_END, 8, 9}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": None}}, {IM_END, 7}),
        ({"config.json": {"text_config": {"eos_token_id": [5]}}}, {IM_END, 5}),
    ],
)
def test_eos_comes_from_the_tokenizer_and_the_first_model_config_that_has_it(tmp_path, files, expected):
    write_byte_tokenizer(tmp_path)
    for name, value in files.items():
        write_json(tmp_path, name, value)
    assert Tokenizer.load(str(tmp_path)).eos_ids == expected


def test_bos_and_eos_come_from_special_tokens_map_when_the_config_lacks_them(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", {})
    tokens = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_start|>"}
    write_json(tmp_path, "special_tokens_map.json", tokens)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (END_OF_TEXT, {IM_START})


def test_named_token_is_special_even_where_the_definition_calls_it_plain(tmp_path):
    write_byte_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    write_json(tmp_path, "tokenizer.json", definition)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.decode([IM_START, 65, IM_END]) == "<|im_start|>A"


def test_bos_id_of_the_model_config_is_used_when_no_token_is_named(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"bos_token_id": 256})
    assert Tokenizer.load(str(tmp_path)).bos_id == 256


def test_malformed_eos_is_refused_by_name(tmp_path):
    write_byte_tokenizer(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": ["</s>"]})
    with pytest.raises(TextError, match="eos_token_id must be a token id"):
        Tokenizer.load(str(tmp_path))


def test_folder_without_tokenizer_json_says_what_is_needed(tmp_path):
    with pytest.raises(TextError, match=r"has no tokenizer: none of tokenizer\.json, tekken"):
        Tokenizer.load(str(tmp_path))


def test_every_truncation_of_tokenizer_json_is_a_clear_error(tmp_path):
    whole = (write_byte_tokenizer(tmp_path) / "tokenizer.json").read_bytes()
    for size in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        with pytest.raises(TextError, match=r"tokenizer\.json is truncated, corrupt"):
            Tokenizer(whole[:size])


@pytest.mark.parametrize(
    "definition",
    [b"[]", b"{}", b'{"decoder": 3}', b'{"decoder": {}}', b'{"model": {"type": "Nope"}}', b"\xff\xfe{}"],
)
def test_wrong_tokenizer_json_is_a_clear_error(definition):
    with pytest.raises(TextError, match=r"tokenizer\.json is truncated, corrupt"):
        Tokenizer(definition)


def test_lone_surrogate_is_a_clear_error(byte_tokenizer):
    with pytest.raises(TextError, match="surrogate"):
        byte_tokenizer.encode("a\ud800b", False)


def test_token_bytes_without_a_rule_are_those_inside_a_text(wordpiece_tokenizer):
    assert [wordpiece_tokenizer.token_bytes(index) for index in (3, 4, 7, 99)] == [b" un", b"know", b",", b""]


def test_long_text_is_encoded_in_a_thread_and_short_text_is_not(byte_tokenizer, monkeypatch):
    threads = []

    class Watching(Tokenizer):
        def encode_many(self, texts, *options):
            threads.append(threading.current_thread())
            return super().encode_many(texts, *options)

    monkeypatch.setattr(byte_tokenizer, "__class__", Watching)
    for size in (THREAD_CHARS - 1, THREAD_CHARS):
        assert asyncio.run(byte_tokenizer.encode_async("a" * size, False)) == [97] * size
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_text_rooms_import_neither_torch_nor_transformers():
    rooms = "aiollm.text.tokenizer, aiollm.text.detokenizer, aiollm.text.stop, aiollm.text.chat"
    code = f"import sys, {rooms}; sys.exit(bool({{'torch', 'transformers', 'triton'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
