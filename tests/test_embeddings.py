"""Embeddings through a real server: the last hidden state of transformers, whatever else the batch holds."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Server
from tiny_model import equivalent, in_fp32, write_tiny_model
from tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

FLAGS = ("--data_type", "fp32", "--threads", "1", "--max_total_token_num", "3000", "--chunked_prefill_size", "16")
TEXTS = ["The owl and the pussy-cat went to sea", "The owl", "x", "The owl and the pussy-cat went to sea in a boat"]


def truth(folder: Path) -> Callable[[str], Any]:
    """The hidden state at a text's last token, scaled to length 1, by transformers."""
    model = in_fp32(equivalent(folder))

    def of(text: str) -> Any:
        with torch.no_grad():
            hidden = model.model(torch.tensor([list(text.encode())])).last_hidden_state[0, -1].numpy()
        return pytest.approx(hidden / np.linalg.norm(hidden), abs=1e-4)

    return of


def vectors(server: Server, **body: Any) -> list[list[float]]:
    return [found["embedding"] for found in server.post("/v1/embeddings", body)["data"]]


@pytest.mark.parametrize(
    ("family", "flags"),
    [("llama", ()), ("cohere2", ()), ("llama", ("--tp", "2", "--device", "cpu"))],
    ids=["llama", "cohere2", "tp"],
)
def test_embeddings_are_the_last_hidden_states_of_transformers(
    family: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path, family, vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(tmp_path)
    expected = truth(tmp_path)
    with Server("--model_dir", str(tmp_path), *FLAGS, *flags) as server:
        for _ in range(2):  # the second time all of them have prefixes in the cache
            assert vectors(server, input=TEXTS) == [expected(text) for text in TEXTS]
        answer = server.post("/v1/embeddings", {"input": TEXTS[3] + "!"})
        assert answer["data"][0]["embedding"] == expected(TEXTS[3] + "!")
        assert len(vectors(server, input="x", dimensions=5)[0]) == 5
        if family == "llama" and not flags:
            beside_streams(server, expected)


def beside_streams(server: Server, expected: Callable[[str], Any]) -> None:
    """Prompts in chunks, in batches with rows that decode; these are not disturbed."""
    prompt = {"prompt": [72, 105], "max_tokens": 150, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    alone = server.post("/v1/completions", prompt)["choices"][0]["token_ids"]
    decodes, computed = threading.Event(), []

    def decode() -> None:
        while not decodes.is_set():
            computed.append(server.post("/v1/completions", prompt)["choices"][0]["token_ids"])

    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(decode) for _ in range(3)]
        try:
            for at in range(6):
                texts = [f"{at} of {text} and {text}" for text in TEXTS]
                assert vectors(server, input=texts) == [expected(text) for text in texts]
        finally:
            decodes.set()
    assert [stream.result() for stream in streams] == [None] * 3
    assert computed and all(ids == alone for ids in computed)
