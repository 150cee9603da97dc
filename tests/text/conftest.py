import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_tokenizer import (
    write_byte_tokenizer,
    write_sentencepiece_tokenizer,
    write_wordpiece_tokenizer,
)

from aiollm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(write_byte_tokenizer(tmp_path_factory.mktemp("byte"))))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(write_sentencepiece_tokenizer(tmp_path_factory.mktemp("sentencepiece"))))


@pytest.fixture(scope="session")
def wordpiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(str(write_wordpiece_tokenizer(tmp_path_factory.mktemp("wordpiece"))))
