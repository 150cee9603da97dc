"""The tokens of all single bytes, as grammars see them."""

import pytest
from llguidance import LLTokenizer
from tiny_tokenizer import write_byte_tokenizer

from aiollm.grammar.llguidance import tokenizer_of
from aiollm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    vocabulary = Tokenizer.load(str(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))).vocabulary
    assert vocabulary is not None
    return tokenizer_of(vocabulary, len(vocabulary.pieces))
