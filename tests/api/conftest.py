from collections.abc import Iterator
from pathlib import Path

import pytest
from stand import Runner
from tiny_tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Runner]:
    runner = Runner(folder)
    yield runner
    runner.close()
