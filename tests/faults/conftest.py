from collections.abc import Iterator
from pathlib import Path

import pytest
from calm import CONTEXT, FLAGS, calm, warm_up
from serving import Server
from tiny_model import write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte tokenizer."""
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    return write_byte_tokenizer(made)


@pytest.fixture(scope="session")
def running(folder: Path) -> Iterator[Server]:
    with Server("--model_dir", str(folder), *FLAGS) as server:
        warm_up(server)
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A real server that has to be as it was when the test is over."""
    with calm(running):
        yield running
