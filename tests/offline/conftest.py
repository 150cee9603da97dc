from pathlib import Path

import pytest
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte tokenizer; it hardly ever ends by itself."""
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return write_byte_tokenizer(made)
