import pytest

from aiollm.text.folder import TextError, read_json, special_tokens


def test_missing_file_is_an_empty_object(tmp_path):
    assert read_json(str(tmp_path), "config.json") == {}


@pytest.mark.parametrize("content", ['{"a": 1', "[1]", ""])
def test_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(TextError, match=r"config\.json is not a JSON object"):
        read_json(str(tmp_path), "config.json")


def test_special_tokens_are_strings_or_contents_and_the_first_config_wins():
    first = {"bos_token": {"content": "<s>"}, "eos_token": None, "add_bos_token": True, "tokenizer_class": "X"}
    second = {"bos_token": "<other>", "eos_token": "</s>"}
    assert special_tokens(first, second) == {"bos_token": "<s>", "eos_token": "</s>"}
